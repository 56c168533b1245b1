"""
Builds the sdist, builds the wheel from it, and uses the wheel as users do, from another folder than the clone:

- in an environment that borrows the libraries of this one,
- in an environment that has nothing but what the runtime needs: numpy, Pillow and safetensors.
"""

import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path


ROOT = Path(__file__).parents[1]
MOST_MEGABYTES = 84  # of the runtime and its libraries, above Python
INSTALLED = (
    *(f"binaryvit_hf/*.{kind}" for kind in ("py", "typed", "wasm", "js", "mjs", "d.ts", "html", "css")),
    "configs/*.json",
    "model_cards/*",
    ":(exclude)model_cards/*/latent/*",
)  # the patterns of git, whose * takes folders too


def run(*command: str | Path, folder: Path) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(part) for part in command], cwd=folder, env=environment, stdout=subprocess.PIPE, text=True
    )
    if done.returncode:
        sys.exit(f"{done.stdout}\n{command} ended with {done.returncode}")
    return done.stdout


def expected_files() -> set[str]:
    """Files of the repository that a wheel has, by their names in it."""
    names = run("git", "ls-files", "-z", *INSTALLED, folder=ROOT).split("\0")[:-1]
    renamed = {"binaryvit_hf/runtime/": "binaryvit_runtime/", "binaryvit_hf/cli/": "binaryvit_cli/"}
    renamed |= {"configs/": "binaryvit_hf/configs/", "model_cards/": "binaryvit_hf/model_cards/"}
    for old, new in renamed.items():
        names = [new + name.removeprefix(old) if name.startswith(old) else name for name in names]
    return set(names)


def install(wheel: Path, environment: Path) -> Path:
    """Install a wheel without its requirements, which come from this environment. Returns the folder of programs."""
    run(sys.executable, "-m", "venv", "--without-pip", environment, folder=ROOT)
    programs = environment / "bin"
    run(sys.executable, "-m", "pip", "--python", programs / "python", "install", "-q", "--no-deps", wheel, folder=ROOT)
    site_packages = next(environment.glob("lib/python*/site-packages"))
    # Python ignores the .pth files in folders that are added here, so the editable install of this environment is not seen.
    libraries = [path for path in sys.path if Path(path).name == "site-packages"]
    (site_packages / "libraries.pth").write_text("\n".join(libraries))
    return programs


def check_runtime(wheel: Path, environment: Path) -> None:
    """Classify with the command of README.md for machines without PyTorch."""
    run(sys.executable, "-m", "venv", environment, folder=ROOT)
    before = bytes_of(environment)
    packages = ("numpy>=1.26", "pillow>=11,<13", "safetensors>=0.8")
    run(
        environment / "bin" / "pip", "install", "-q", "--no-deps", "--no-compile", wheel, *packages, folder=environment
    )
    added = (bytes_of(environment) - before) / 10**6
    sys.stdout.write(f"The runtime takes {added:.0f} MB.\n")
    if added > MOST_MEGABYTES:
        sys.exit(f"The runtime takes {added:.0f} MB; the maximum is {MOST_MEGABYTES}.")
    example = ROOT / "model_cards" / "binaryvit-digits" / "example.png"
    answer = run(environment / "bin" / "binaryvit", "classify", "binaryvit-digits", example, folder=environment)
    if "%" not in answer:
        sys.exit(f"The command does not classify without PyTorch: {answer}")
    run(environment / "bin" / "binaryvit", "doctor", folder=environment)
    code = "import sys; sys.exit(any(map(__import__('importlib.util').util.find_spec, ('torch', 'transformers'))))"
    run(environment / "bin" / "python", "-c", code, folder=environment)


def bytes_of(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*"))


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        run(sys.executable, "-m", "build", "--outdir", folder, ROOT, folder=folder)  # the wheel from the sdist
        (wheel,) = folder.glob("*.whl")
        missing = expected_files() - set(zipfile.ZipFile(wheel).namelist())
        if missing:
            sys.exit(f"The wheel lacks {sorted(missing)}.")
        programs = install(wheel, folder / "environment")
        check = "from binaryvit_runtime import engine; assert 'site-packages' in engine.__file__ and engine.kernels_here(), engine.problem()"
        run(programs / "python", "-c", check, folder=folder)
        image = ROOT / "model_cards" / "binaryvit-digits" / "example.png"
        answer = run(programs / "binaryvit", "classify", "binaryvit-digits", image, folder=folder)
        if "%" not in answer:
            sys.exit(f"The installed command does not classify: {answer}")
        run(programs / "python", "-m", "binaryvit_hf.training", "--help", folder=folder)
        check_runtime(wheel, folder / "runtime")


main()
