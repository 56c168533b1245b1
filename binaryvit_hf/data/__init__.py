"""
Images and labels for training and evaluation.

Input: image folders, files, datasets of the Hub or of this machine, and `DataArguments` that choose them.
Output: `torch` datasets of `pixel_values` and `labels`, samplers, and one-sentence errors about unusable images.

The files, in the order in which an image passes them:

1. `arguments` and `augmentation` declare the command line's arguments.
2. `loading` chooses the splits. It uses `image_folders` (with `image_files`), `known_datasets` and `streaming`. `held_out`
   divides them. `schema` gives every dataset the same two columns, `image` (encoded) and `label`.
3. `image_checks` finds broken, transparent and one-colour images before training. `label_names` compares the labels with
   a trained model's.
4. `sampling` determines the order of training and the random numbers of each augmentation.
5. `transforms` decodes (`decoding`) and augments (`augmentation`) an image when a worker reads it. Evaluation uses the image
   processor instead. `batch_crops` augments small images of one size, a batch at once.
6. `model_inputs` creates and measures image processors, and converts a student's batch for its teacher.

These files know the size, mean and standard deviation of a network's input. They know neither weights nor the training loop.
"""
