"""Oscillating weights are frozen, and a frozen bit stays constant."""

import itertools

import pytest
import torch
from tiny import tiny_config, tiny_model
from tiny_training import tiny_trainer

from binaryvit_hf.network.functional_binaryvit import BinarizeWeight, binary_sign
from binaryvit_hf.network.layers_binaryvit import BinaryLinear, BinaryPatchConv
from binaryvit_hf.training.callbacks.oscillation import WatchedWeight


def watched_linear(weight) -> WatchedWeight:
    weight = torch.tensor(weight)
    layer = BinaryLinear(tiny_config(), weight.shape[1], weight.shape[0])
    layer.weight.data = weight
    return WatchedWeight(layer)


def test_the_first_flip_does_not_count_as_oscillation_and_later_flips_do():
    watched = watched_linear([[0.5, 0.25, -0.75]])  # centred: 0.5, 0.25, -0.75
    frequency = 0.0
    for flip in range(1, 6):
        watched.layer.weight.data = torch.tensor([[0.5, 0.25 * (-1) ** flip, -0.75 + 0.5 * (flip % 2)]])
        watched.step(threshold=0.9)
        frequency = 0.99 * frequency + 0.01 * (flip > 1)
        assert watched.state["flipped"].tolist() == [[False, True, False]]
        assert watched.state["frequency"][0].tolist() == [0.0, pytest.approx(frequency, rel=2e-3), 0.0]
    assert not watched.state["frozen"].any()
    quiet = watched.state["frequency"][0, 1].item()
    watched.step(threshold=0.9)
    assert watched.state["frequency"][0, 1].item() == pytest.approx(0.99 * quiet, rel=2e-3)


def test_a_frozen_weight_takes_the_value_of_its_majority_sign():
    watched = watched_linear([[0.5, 0.25, -0.75]])
    for value in (-0.25, 0.25, -0.25):  # it was positive first, so the majority stays positive
        watched.layer.weight.data = torch.tensor([[0.5, value, -0.25 - value]])
        watched.step(threshold=0.015)
    assert watched.state["frozen"].tolist() == [[False, True, False]]
    scale = (0.5 + 0.25 + 0.0) / 3
    assert watched.state["magnitude"].item() == pytest.approx(scale)
    weight = watched.layer.weight
    assert (weight[0, 1] - weight.mean()).item() == pytest.approx(scale)
    assert weight[0, [0, 2]].tolist() == [0.5, 0.0]
    assert BinarizeWeight.apply(weight, True)[0, 1] > 0


@pytest.mark.parametrize("drift", [0.0, 0.05, -0.05])
def test_a_frozen_bit_stays_when_the_rows_mean_moves(drift):
    """The noise flips signs; the drift of whole rows would move every latent weight across zero and back."""
    generator = torch.Generator().manual_seed(0)
    layer = BinaryLinear(tiny_config(), 16, 8)
    layer.weight.data = 0.1 * torch.randn(8, 16, generator=generator)
    watched, frozen, bits = WatchedWeight(layer), None, None
    for _ in range(200):
        layer.weight.data += 0.1 * torch.randn(8, 16, generator=generator) + drift
        watched.step(threshold=0.03)
        signs = watched.signs()
        if frozen is not None:
            assert torch.equal(signs[frozen], bits[frozen])
        frozen, bits = watched.state["frozen"].clone(), signs
        held = (layer.weight - layer.weight.mean(1, keepdim=True)).abs()[frozen]
        torch.testing.assert_close(held, watched.state["magnitude"].expand_as(frozen)[frozen])
    assert frozen.float().mean() > 0.5
    assert (~frozen).any(1).all()  # distances from a mean sum to zero
    assert layer.weight.isfinite().all()


def test_the_last_weights_of_a_row_stay_free():
    """Two weights at the same distance from their mean flip together, and cannot be frozen at different distances."""
    watched = watched_linear([[0.5, -0.5]])
    for value in (-0.5, 0.5, -0.5, 0.5):
        watched.layer.weight.data = torch.tensor([[value, -value]])
        watched.step(threshold=0.015)
        assert watched.layer.weight.tolist() == [[value, -value]]
    assert (watched.state["frequency"] > 0.015).all()
    assert not watched.state["frozen"].any()


def test_rows_without_frozen_weights_are_left_alone():
    watched = watched_linear([[0.5, 0.25, -0.75], [0.1, 0.2, -0.3]])
    for value in (-0.25, 0.25, -0.25):
        watched.layer.weight.data = torch.tensor([[0.5, value, -0.25 - value], [0.1, 0.2, -0.3]])
        watched.step(threshold=0.015)
    assert watched.state["frozen"].any(1).tolist() == [True, False]
    assert torch.equal(watched.layer.weight[1], torch.tensor([0.1, 0.2, -0.3]))


def test_a_convolutions_weights_are_frozen_at_a_distance_from_zero():
    layer = BinaryPatchConv(tiny_config(), 1, 1)
    layer.weight.data = torch.tensor([[[[0.5, 0.5], [0.5, 0.5]]]])
    watched = WatchedWeight(layer)
    for sign in (-1, 1, -1):
        layer.weight.data = torch.tensor([[[[0.5 * sign, 0.5], [0.5 * sign, 0.5]]]])
        watched.step(threshold=0.015)
    assert watched.state["frozen"].tolist() == [[True, False, True, False]]
    layer.weight.data -= 9
    watched.step(threshold=0.015)
    assert layer.weight.flatten().tolist() == [0.5, -8.5, 0.5, -8.5]


def test_training_keeps_frozen_bits_and_logs_their_share(tmp_path, caplog):
    trainer = tiny_trainer(
        tmp_path, oscillation_freezing_threshold=0.015, max_steps=12, learning_rate=0.05, weight_decay=0.1
    )
    (freezing,) = trainer.checkpointed
    seen = []
    step = freezing.on_optimizer_step

    def note(*args, **kwargs):
        step(*args, **kwargs)
        seen.append([(watched.state["frozen"].clone(), watched.signs()) for watched in freezing.watched.values()])

    freezing.on_optimizer_step = note
    with caplog.at_level("INFO"):
        trainer.train()
    assert any(frozen.any() for frozen, _ in seen[-1])
    for before, after in itertools.pairwise(seen):
        for (frozen, bits), (still, then) in zip(before, after):
            assert torch.equal(bits[frozen], then[frozen])
            assert (still | ~frozen).all()
    assert f"{100 * freezing.share_frozen():.2f} % of the 1-bit weights oscillated" in caplog.text


def test_the_watched_signs_are_those_of_binarisation():
    model = tiny_model()
    for module in model.modules():
        if isinstance(module, BinaryLinear | BinaryPatchConv):
            bits = BinarizeWeight.apply(module.weight, isinstance(module, BinaryLinear))
            assert torch.equal(WatchedWeight(module).signs(), binary_sign(bits).flatten(1))
