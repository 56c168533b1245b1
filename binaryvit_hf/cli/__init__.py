"""`binaryvit pack | convert | ops | classify | push | benchmark | ablation | card`: what is done with models besides training them."""

import argparse
import codecs
import contextlib
import importlib
import io
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from transformers import (
    BaseImageProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    pipeline,
)
from transformers.utils.logging import disable_progress_bar

from ..convert import convert_name, convert_original_state_dict, count_labels, load_original_checkpoint
from ..data.image_files import create_image_processor, list_images
from ..doctor import check_engine_variable, describe_machine
from ..errors import LoadingError, RunError, UploadError, UserError, first_sentence, one_line
from ..hub import NOT_UPLOADED, create_repository, told_how_to_resume_upload, upload_folder
from ..loading import build_classifier, check_finite, load_classifier, load_config, load_image_processor
from ..network.quantization_binaryvit import LATENT, QUANT_METHOD, BinaryViTQuantizationConfig, ShippedModel, fits_half
from ..ops import CONFIG_CLASSES, count_operations, format_table, readable, total
from ..pixels import check_background, describe_transparent
from ..resources import shipped_configs, shipped_models
from ..writing import check_writable_file, describe_full_disk, new_folder
from .classification import classify_files


BENCHMARKED_ROW = "binaryvit-small-patch4-224"
TEACHER_ROW = "deit-small-patch16-224"
DOCUMENTS = ("learning_curves.png", "run_arguments.json", "all_results.json", "trainer_state.json")
PLOTS = (".png", ".svg", ".pdf")
BROKEN_PIPE = 128 + 13  # what a shell says of a program that SIGPIPE ended


def main(arguments: list[str] | None = None) -> int:
    disable_progress_bar()
    options = create_parser().parse_args(arguments)
    if isinstance(sys.stdout, io.TextIOWrapper):  # names of files may be any bytes
        utf8 = codecs.lookup(sys.stdout.encoding).name == "utf-8"
        sys.stdout.reconfigure(errors="surrogateescape" if utf8 else "backslashreplace")
    try:
        check_engine_variable()
        code = options.run(options) or 0
        sys.stdout.flush()
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more as it ends
        return BROKEN_PIPE
    except (UserError, RunError, UploadError) as error:
        print_error(str(error))
        return 2 if isinstance(error, UserError) else 1
    except KeyboardInterrupt:
        print_error("Interrupted.")
        return 128 + signal.SIGINT
    except Exception as error:
        if (failure := describe_full_disk(error)) is None:
            raise
        print_error(f"Nothing more can be written: {failure}.")
        return 1
    return code


def print_error(message: str) -> None:
    print(f"error: {one_line(message)}", file=sys.stderr)


def create_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="binaryvit", description="1-bit vision transformers: ship and run them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(run: Callable, example: str) -> argparse.ArgumentParser:
        description = run.__doc__.strip()
        command = commands.add_parser(
            run.__name__,
            help=description.splitlines()[0],
            description=description,
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        command.set_defaults(run=run)
        return command

    def add_token(command: argparse.ArgumentParser) -> None:
        command.add_argument("--token", help="token of the Hub; default: that of the last login")

    command = add(pack, "binaryvit pack outputs/photos/latent photos-half --half")
    command.add_argument("model", metavar="MODEL", help="folder or Hub id of a latent or packed model")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    command.add_argument(
        "--half", action="store_true", help="store the float remainder in half precision where it fits"
    )
    add_token(command)

    command = add(convert, "binaryvit convert checkpoint.pth binaryvit-small --config binaryvit-small-patch4-224")
    command.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a .pth file of the paper's public code")
    command.add_argument("out", metavar="OUT", type=Path, help="folder to write, new or empty")
    command.add_argument("--config", help=f"row of configs/, or a path: {', '.join(sorted(shipped_configs()))}")
    command.add_argument(
        "--teacher", action="store_true", help=f"the file is of a DeiT teacher: --config {TEACHER_ROW}"
    )

    command = add(ops, "binaryvit ops binaryvit-small-patch4-224")
    command.add_argument("model", metavar="MODEL", help="row of configs/, folder or Hub id; only its config is read")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    add_token(command)

    command = add(classify, f"binaryvit classify {next(iter(shipped_models()), 'MODEL')} photos/ cat.jpg 'more/*.png'")
    command.add_argument("model", metavar="MODEL", help="folder, Hub id or a model that comes with binaryvit_hf")
    command.add_argument("images", metavar="IMAGE", nargs="+", help="image file, folder of them, or pattern")
    command.add_argument(
        "--background", metavar="COLOUR", help="put this colour behind transparent pixels, such as white or '#ffcc00'"
    )
    command.add_argument("--top-k", type=int, default=5, help="labels to name for each image (default 5)")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")
    add_token(command)

    command = add(push, "binaryvit push outputs/quickstart me/digits --private")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a trained model")
    command.add_argument("repository", metavar="REPOSITORY", help="Hub id, made if it is not there")
    command.add_argument("--private", action="store_true", default=None, help="make a new repository private")
    command.add_argument("--revision", help="branch to upload to, made if it is not there (default main)")
    command.add_argument("--message", default="Upload model", help="message of the commit")
    add_token(command)

    command = add(benchmark, "binaryvit benchmark --threads 1 2 --batch-size 1 8 --plot latency.png")
    kinds = command.add_mutually_exclusive_group()
    kinds.add_argument("--train", action="store_true", help="training steps, beside DeiT-S and the plain simulation")
    kinds.add_argument(
        "--loader", action="store_true", help="loading images on one core, beside the paper's public code"
    )
    command.add_argument("--model", default=BENCHMARKED_ROW, help=f"row of configs/ (default {BENCHMARKED_ROW})")
    command.add_argument(
        "--batch-size",
        type=int,
        nargs="+",
        help="images at once (default 1 and 8; a training step: 8 on the CPU, 128 on a GPU)",
    )
    command.add_argument("--threads", type=int, nargs="+", help="threads of a forward (default 1 and all)")
    command.add_argument("--steps", type=int, default=7, help="turns to time of each network, 2 or more (default 7)")
    command.add_argument("--plot", type=Path, metavar="FILE", help="image file to draw the forwards' times to")
    command.add_argument("--json", action="store_true", help="print JSON instead of text")

    command = add(ablation, "binaryvit ablation configs/fashion-mnist outputs/fashion-mnist --seeds 1 2 3 --jobs 2")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="folder of recipes, as configs/fashion-mnist")
    command.add_argument("out", metavar="OUT", type=Path, help="folder of the runs, results.md and ablation.png")
    command.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3], help="of the students (default 1 2 3)")
    command.add_argument("--jobs", type=int, default=1, help="students to train at once (default 1)")

    add(doctor, "binaryvit doctor")

    command = add(card, "binaryvit card outputs/quickstart")
    command.add_argument("folder", metavar="FOLDER", type=Path, help="folder of a trained model or of a config")
    command.add_argument("--out", type=Path, help="file to write (default FOLDER/README.md)")
    command.add_argument("--model-id", help="what readers load the model by (default FOLDER)")
    return parser


def doctor(options: argparse.Namespace) -> None:
    """Say what is installed, what this CPU can do, and what computes packed models on it."""
    print(describe_machine())


def pack(options: argparse.Namespace) -> None:
    """Pack a model's weights: a bit a weight, or as many as its config says."""
    with new_folder(options.out) as folder:
        source, config = find_model(options.model, options.token, shipped_models())
        if config.model_type != QUANT_METHOD:
            raise UserError(f"{options.model!r} is a {config.model_type!r}; only binary networks can be packed.")
        latent = getattr(config, "quantization_config", None) is None
        packing = {"quantization_config": BinaryViTQuantizationConfig()} if latent else {}
        model = load_model(options.model, source, options.token, **packing)
        processor = load_processor(options.model, source, options.token, config)
        model.config.quantization_config.half = options.half
        model.save_pretrained(folder)
        if processor is not None:  # a network without one is no less a network
            processor.save_pretrained(folder)
        copy_companions(source, folder)
        write_card_if_possible(folder, str(options.out))
    print(f"{options.out}: {readable(sum(file.stat().st_size for file in options.out.glob('*.safetensors')), 'B')}")
    if options.half:
        floats = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        wide = [name for name, tensor in floats.items() if not fits_half(name, tensor)]
        print(
            f"{len(wide)} of {len(floats)} float tensors stay in float32, out of the range of half precision", end=""
        )
        print(":", *wide, sep="\n  " if wide else "")


def convert(options: argparse.Namespace) -> None:
    """Turn a checkpoint of the paper's public code into a model of ours."""
    if not options.config and not options.teacher:
        raise UserError(
            f"Say which network it is: --config with one of {', '.join(sorted(shipped_configs()))}; or --teacher."
        )
    with new_folder(options.out) as folder:
        _, config = find_model(options.config or TEACHER_ROW, None, shipped_configs())
        state_dict = load_original_checkpoint(options.checkpoint)
        if config.model_type not in CONFIG_CLASSES:
            raise UserError(f"--config {options.config!r} is a {config.model_type!r}, which that code does not train.")
        config.num_labels = count_labels(state_dict, otherwise=config.num_labels)
        try:
            converted = convert_original_state_dict(state_dict, config)
            model = build_classifier(config)
            model.load_state_dict(converted)
            check_finite(model)
        except ValueError as error:
            raise UserError(f"{str(options.checkpoint)!r} does not fit the config: {error}") from error
        model.save_pretrained(folder)
        create_image_processor(config, crop_pct=0.875).save_pretrained(folder)
    for name, tensor in state_dict.items():
        print(f"{name} -> {convert_name(name, config)} {list(tensor.shape)}")
    print(f"{options.out}: {len(converted)} tensors, {readable(model.num_parameters())} parameters")


def ops(options: argparse.Namespace) -> None:
    """Count the operations and bytes of a network, for each kind of layer and in all."""
    _, config = find_model(options.model, options.token, shipped_configs() | shipped_models())
    try:
        costs = count_operations(config)
    except LoadingError as error:
        raise UserError(f"The operations of {options.model!r} cannot be counted: {error}") from error
    if options.json:
        described = [asdict(cost) | {"ops": cost.ops} for cost in (*costs, total(costs))]
        print(json.dumps({"layers": described[:-1], "total": described[-1]}, indent=2))
    else:
        print(format_table(costs))


def classify(options: argparse.Namespace) -> int:
    """Name what images show, with probabilities."""
    if options.top_k < 1:
        raise UserError(f"--top-k is the number of labels to name, 1 or more, not {options.top_k}.")
    try:
        check_background(options.background)
    except ValueError as error:
        raise UserError(str(error)) from error
    files, notes = list_images(options.images)
    source, _ = find_model(options.model, options.token, shipped_models())
    model = load_model(options.model, source, options.token)
    processor = load_processor(options.model, source, options.token, model.config)
    if processor is None:
        raise UserError(f"{options.model!r} has no image processor (preprocessor_config.json).")
    for note in notes:
        print(note, file=sys.stderr)
    classifier = pipeline("image-classification", model=model, image_processor=processor)
    answers = []
    for answer in classify_files(classifier, files, options.background, options.top_k):
        answers.append(answer)
        if answer.error:
            print_error(answer.error)
        elif not options.json:
            print(answer.image)
            for label in answer.labels:
                print(f"  {100 * label['score']:6.2f} %  {label['label']}", flush=True)
    if options.json:
        print(json.dumps([answer.describe() for answer in answers], indent=2))
    transparent = [answer.image for answer in answers if answer.transparent]
    if transparent and options.background is None:
        print(describe_transparent(len(transparent), f"{len(answers)} images", transparent[0]), file=sys.stderr)
    return 1 if any(answer.error for answer in answers) else 0


def push(options: argparse.Namespace) -> None:
    """Upload a trained model to the Hub: packed weights, latent ones in the folder 'latent', card and image processor."""
    folder = options.folder
    if not (folder / "config.json").is_file():
        raise UserError(f"{str(folder)!r} is no folder of a model: it has no config.json.")
    model = load_model(str(folder), str(folder), options.token)  # what does not load is not published
    load_processor(str(folder), str(folder), options.token, model.config)  # likewise
    repository = create_repository(options.repository, options.token, options.private)
    with tempfile.TemporaryDirectory() as staging:
        staged = Path(staging) / "model"
        shutil.copytree(folder, staged, ignore=shutil.ignore_patterns(*NOT_UPLOADED))
        latent = model.config.model_type == QUANT_METHOD and model.config.weight_bits < 32 and not model.is_packed
        (ShippedModel(model) if latent else model).save_pretrained(staged)  # which brings the code, too
        readme = staged / "README.md"
        if readme.is_file():  # it was written before the model had its place on the Hub
            text = readme.read_text(encoding="utf-8").replace(f'"{folder}"', f'"{repository}"')
            readme.write_text(text, encoding="utf-8")
        else:
            write_card_if_possible(staged, repository)
        with told_how_to_resume_upload(folder, repository, options.revision):
            print(upload_folder(staged, repository, options.token, options.revision, options.message))


def benchmark(options: argparse.Namespace) -> None:
    """Measure, beside peers in the same run, what a forward takes, or what training takes."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger(__package__).setLevel(logging.INFO)
    if options.steps < 2:
        raise UserError(f"--steps is 2 or more, not {options.steps}.")
    if min(options.batch_size or [1]) < 1 or min(options.threads or [1]) < 1:
        raise UserError("--batch-size and --threads are 1 or more.")
    if options.train or options.loader:
        benchmark_trainer(options)
        return
    if options.plot:
        check_plot(options.plot)
    from ..benchmarks.inference import benchmark_inference, format_forwards, plot_latency

    measured = benchmark_inference(options.model, options.batch_size or [1, 8], options.threads, options.steps)
    print(json.dumps(measured, indent=2) if options.json else format_forwards(measured))
    if options.plot:
        plot_latency(measured, options.plot)


def check_plot(file: Path) -> None:
    """
    Raises:
        UserError: no plot can be drawn there.
    """
    with needs_extra("benchmark", "Plots"):
        importlib.import_module("matplotlib.figure")
    if file.suffix not in PLOTS:
        raise UserError(f"--plot is a file of the kinds {', '.join(PLOTS)}, not {str(file)!r}.")
    check_writable_file(file)


def benchmark_trainer(options: argparse.Namespace) -> None:
    if options.threads or options.plot or len(options.batch_size or [1]) > 1:
        raise UserError("--threads, --plot and several --batch-size are of forwards, not of --train and --loader.")
    if options.loader:
        with needs_extra("train", "Benchmarks of the loader"):
            from ..benchmarks.loader import benchmark_loader, format_speeds
        measured = benchmark_loader()
        print(json.dumps(measured, indent=2) if options.json else format_speeds(measured))
    else:
        from ..benchmarks.training import benchmark_training, format_steps  # of Unix alone, which the rest is not

        (batch_size,) = options.batch_size or [None]
        measured = benchmark_training(options.model, batch_size, options.steps)
        print(json.dumps(measured, indent=2) if options.json else format_steps(measured))


def ablation(options: argparse.Namespace) -> None:
    """Train all rows of an ablation that are not trained yet, and write their table and plot."""
    if options.jobs < 1:
        raise UserError(f"--jobs is how many students to train at once, 1 or more, not {options.jobs}.")
    with needs_extra("train", "Ablations"):
        from ..training.ablation import Ablation, run_ablation

    logging.basicConfig(format="%(message)s", level=logging.INFO)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
    run_ablation(Ablation(options.folder, options.out, tuple(options.seeds)), options.jobs)
    print(options.out / "results.md")


def card(options: argparse.Namespace) -> None:
    """Write the model card of a folder, from the files in it."""
    if not (options.folder / "config.json").is_file():
        raise UserError(f"{str(options.folder)!r} is no folder of a model: it has no config.json.")
    out = options.out or options.folder / "README.md"
    check_writable_file(out)
    write_card(options.folder, options.model_id or str(options.folder), out)
    print(out)


def write_card(folder: Path, model_id: str, path: Path | None = None) -> None:
    with needs_extra("train", "Model cards"):
        from ..training.report import write_model_card
    write_model_card(folder, model_id, path)


@contextlib.contextmanager
def needs_extra(extra: str, what: str) -> Iterator[None]:
    """
    Raises:
        UserError: what is imported inside of this is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise UserError(f"{what} need {error.name!r}: pip install 'binaryvit_hf[{extra}]'.") from error


def write_card_if_possible(folder: Path, model_id: str) -> None:
    """A model without a card is a model all the same."""
    try:
        write_card(folder, model_id)
    except Exception as error:  # whatever is in the files that a card is made from
        print(one_line(f"There is no model card: {first_sentence(error)}"), file=sys.stderr)


def find_model(name: str, token: str | None, shipped: dict[str, Path]) -> tuple[str, PreTrainedConfig]:
    """
    Where the model that a user names is loaded from, and its config: a folder, what is shipped by that name, or the Hub.

    Raises:
        UserError: there is none, or its config is damaged.
    """
    source = name if os.path.exists(name) else str(shipped.get(name, name))
    try:
        return source, load_config(source, token=token)
    except LoadingError as error:
        if os.path.isfile(os.path.join(source, "config.json")):
            raise UserError(f"The config of {name!r} cannot be loaded: {error}") from error
        raise UserError(
            f"The model {name!r} cannot be loaded ({str(error).rstrip('.')}); a model is a folder with a config.json, an "
            f"id of the Hub, or one of {', '.join(sorted(shipped))}."
        ) from error


def load_model(name: str, source: str, token: str | None, **kwargs) -> PreTrainedModel:
    try:
        return load_classifier(source, token=token, **kwargs)
    except LoadingError as error:
        raise UserError(f"The weights of {name!r} cannot be loaded: {error}") from error


def load_processor(name: str, source: str, token: str | None, config: PreTrainedConfig) -> BaseImageProcessor | None:
    """
    The image processor of a model, `None` if it has none.

    Raises:
        UserError: it is damaged, or not for a network of this config.
    """
    try:
        return load_image_processor(source, config, token=token)
    except LoadingError as error:
        raise UserError(
            f"The image processor of {name!r} (preprocessor_config.json) cannot be used: {error}"
        ) from error


def copy_companions(source: str, folder: Path) -> None:
    """What documents a local run; latent weights have it in the folder above."""
    run = Path(source).parent if Path(source).name == LATENT else Path(source)
    for document in DOCUMENTS:
        if (run / document).is_file():
            shutil.copy(run / document, folder)
