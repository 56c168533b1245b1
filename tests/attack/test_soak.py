"""Models in many threads, in forks and for a long time: the answers stay the same and memory does not grow."""

import os
import threading
import time
from pathlib import Path
from random import Random

import pytest
import torch
from harness import HANGS, Wrong, few_or_many, resident
from shelf import LABELS
from tiny import class_token_config, tiny_config, tiny_model
from transformers import AutoModelForImageClassification

from binaryvit_hf import BinaryViTQuantizationConfig
from binaryvit_hf.network.engine_binaryvit import describe_obstacle


THREADS = 8
SECONDS = 2.0  # of a case of the soak test
GROWTH = 64 * 2**20  # allowed bytes above the memory after the first cases
IMAGES = torch.randn(8, 3, 16, 32, generator=torch.Generator().manual_seed(2))


class Known:
    """A packed model and its logits of `IMAGES`, computed by PyTorch."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.model = self.load()
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setenv("BINARYVIT_ENGINE", "torch")
            self.logits = self.load()(IMAGES).logits

    def load(self):
        return AutoModelForImageClassification.from_pretrained(self.folder).eval()

    def check(self, rng: Random, model=None) -> None:
        """
        Raises:
            Wrong: the logits differ.
        """
        start = rng.randrange(len(IMAGES))
        # A slice needs no kernel of PyTorch. In a fork, a kernel hangs if it used two threads before.
        chosen = slice(start, rng.randrange(start, len(IMAGES)) + 1)
        with torch.no_grad():
            logits = (model or self.model)(IMAGES[chosen]).logits
        if not torch.allclose(logits, self.logits[chosen], rtol=1e-3, atol=1e-4):
            raise Wrong(f"off by {(logits - self.logits[chosen]).abs().max():g}")


@pytest.fixture(scope="module")
def known(tmp_path_factory) -> list[Known]:
    models = []
    configs = [{}, {"use_layer_scale": False}, {"weight_bits": 2}]
    for number, config in enumerate(
        [*(tiny_config(id2label=LABELS, **changes) for changes in configs), class_token_config()]
    ):
        folder = tmp_path_factory.mktemp(f"model{number}")
        tiny_model(config).save_pretrained(folder / "latent")
        packed = AutoModelForImageClassification.from_pretrained(
            folder / "latent", quantization_config=BinaryViTQuantizationConfig()
        )
        packed.save_pretrained(folder / "packed")
        models.append(Known(folder / "packed"))
    return models


def edit(rng: Random, known: Known) -> None:
    """Load a model, change its weights and change them back. The logits follow."""
    model = known.load()
    known.check(rng, model)
    with torch.no_grad():
        before = model(IMAGES[:1]).logits
        model.classifier.bias.add_(1.0)
        if not torch.allclose(model(IMAGES[:1]).logits, before + 1, atol=1e-4):
            raise Wrong("a change was not seen")
        model.classifier.bias.sub_(1.0)
    known.check(rng, model)


@few_or_many(1, 60)
def test_threads(cases, assert_withstood, known):
    """Eight threads. Most share a model, some edit their own."""

    def attack(rng: Random, folder: Path) -> str:
        shared, faults = rng.choice(known), []

        def answer(seed: int) -> None:
            own = Random(seed)
            try:
                for _ in range(10):
                    edit(own, own.choice(known)) if own.random() < 0.1 else shared.check(own)
            except BaseException as fault:
                faults.append(fault)

        threads = [threading.Thread(target=answer, args=[rng.random()]) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for fault in faults:
            raise fault
        return "answered"

    assert_withstood(attack, cases, "threads")


@few_or_many(5, 200)
def test_forks_after_a_forward(cases, assert_withstood, known):
    # PyTorch, not the engine, computes the other models.
    known = [one for one in known if describe_obstacle(one.model.base_model) is None]
    assert len(known) == 3

    def attack(rng: Random, folder: Path) -> str:
        torch.set_num_threads(rng.choice([1, 2]))
        one = rng.choice(known)
        one.check(rng)
        child = os.fork()
        if child == 0:
            code = 1
            try:
                one.check(rng)
                rng.choice(known).check(rng)
                code = 0
            finally:
                os._exit(code)
        one.check(rng)
        deadline = time.monotonic() + HANGS
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                raise Wrong("the forked process hangs")
            time.sleep(0.002)
        if ended[1] != 0:
            raise Wrong("the forked process answers otherwise")
        return "answered"

    assert_withstood(attack, cases, "forks")


@few_or_many(1, 150)
def test_soak(cases, assert_withstood, known):
    """Models are loaded, edited and deleted with changing numbers of threads, with `-m slow` for five minutes."""
    sizes = []

    def attack(rng: Random, folder: Path) -> str:
        until = time.monotonic() + SECONDS
        while time.monotonic() < until:
            torch.set_num_threads(rng.choice([1, 2, 3]))
            action = rng.random()
            if action < 0.02:
                edit(rng, rng.choice(known))
            elif action < 0.04:
                one = rng.choice(known)
                one.check(rng, one.load())
            else:
                rng.choice(known).check(rng)
        sizes.append(resident(os.getpid()))
        if len(sizes) > 3 and sizes[-1] > max(sizes[:3]) + GROWTH:
            raise Wrong(f"memory grew from {max(sizes[:3]) / 2**20:.0f} MB to {sizes[-1] / 2**20:.0f} MB")
        return "answered"

    assert_withstood(attack, cases, "soak")
