"""
Train, distil and evaluate image classifiers: `python -m binaryvit_hf.training ARGUMENTS`.

Enters: a command line, optionally with a JSON or YAML file of arguments. Leaves: an output directory with
- the model, packed, and its latent weights in `latent/`, which can be trained further;
- `checkpoint-STEP/`, each whole, from which the same command resumes;
- `run_arguments.json`, and the metrics in `train_`, `eval_`, `test_` and `all_results.json`;
- `learning_curves.png` and the model card, `README.md`.

The files, in the order in which a run uses them:

    run.py           main: parse, check, prepare, run; errors become one sentence and an exit code
    command_line.py  flags and files -> the arguments of one run, or of a teacher's and its student's
    arguments.py     the arguments as dataclasses; optional_methods.py: those of methods beyond the paper's recipe
    preparation.py   every check that needs no training: unused_arguments.py, batch_checks.py, checkpoints.py (is it whole?)
    models.py        student, teacher and image processors; two_stage.py: the first of two stages; stochastic_depth.py
    steps.py         train, evaluate, test, report, upload
    trainer.py       transformers' Trainer with losses.py, checkpoints and packing; callbacks/
    run_folder.py    the files that describe a run, and whether a run may resume from them
    metrics.py, learning_curves.py, model_card.py

`process_errors.py` shows an error once for several processes. `ablation.py` starts the runs of a whole table.

This room imports the network, the data and the shared files below them. It must not know the command line tool (`cli/`),
the benchmarks or the script `run_image_classification.py`.
"""
