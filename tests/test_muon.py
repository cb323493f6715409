"""Steps of Muon against singular value decompositions, and optimizers that share a model."""

import numpy as np
import pytest
import torch

import folders
import pretrain
import runs
from muon import POLYNOMIAL, Muon, orthogonal

SHAPES = [(6, 6), (4, 9), (9, 4)]


def matrix(shape, *, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearly_orthogonal(x: np.ndarray) -> np.ndarray:
    """The polynomial, taken of every singular value on its own."""
    u, sizes, v = np.linalg.svd(x, full_matrices=False)
    sizes, (a, b, c) = sizes / np.linalg.norm(x), POLYNOMIAL
    for _ in range(5):
        sizes = a * sizes + b * sizes**3 + c * sizes**5
    return u @ np.diag(sizes) @ v


@pytest.mark.parametrize("shape", SHAPES)
def test_every_direction_of_an_orthogonal_step_counts_about_the_same(shape):
    x = matrix(shape)
    u, sizes, v = torch.linalg.svd(x, full_matrices=False)
    found = u.mT @ orthogonal(x) @ v.mT                           # diagonal: the same directions
    assert found.diagonal().min() > .65 and found.diagonal().max() < 1.25
    assert (found - found.diagonal().diag()).abs().max() < 1e-5
    assert sizes.max() / sizes.min() > 2


@pytest.mark.parametrize("shape", SHAPES)
def test_products_of_matrices_give_the_polynomial_of_the_singular_values(shape):
    x = matrix(shape)
    assert orthogonal(x).numpy() == pytest.approx(nearly_orthogonal(x.numpy().astype(float)),
                                                  abs=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_three_steps_equal_the_formula_written_out(shape):
    weight = torch.nn.Parameter(matrix(shape, seed=1))
    optimizer = Muon([weight], lr=.01)
    expected, memory = weight.detach().numpy().astype(float), np.zeros(shape)
    for step in range(3):
        weight.grad = matrix(shape, seed=10 + step)
        gradient = weight.grad.numpy().astype(float)
        memory = .95 * memory + .05 * gradient
        towards = nearly_orthogonal(.05 * gradient + .95 * memory)
        expected = (1 - .01 * .1) * expected - .002 * max(shape) ** .5 * towards
        optimizer.step()
    assert weight.detach().numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("shape", [(64, 64), (32, 128), (128, 32)])
def test_a_step_moves_an_entry_by_about_a_fifth_of_the_learning_rate(shape):
    weight = torch.nn.Parameter(torch.zeros(shape))
    weight.grad = matrix(shape)
    Muon([weight], lr=.01).step()
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(.002, rel=.2)


def test_a_gradient_of_zero_moves_nothing():
    weight = torch.nn.Parameter(torch.ones(3, 4))
    weight.grad = torch.zeros(3, 4)
    Muon([weight], lr=.01, weight_decay=0.).step()
    assert weight.equal(torch.ones(3, 4))


# ---- two optimizers, one model --------------------------------------------------------------

@pytest.fixture
def lm(tiny_lm):
    model = folders.load(tiny_lm)
    return pretrain.MaskedLM(model, folders.load_masked_lm(tiny_lm, model))


@pytest.mark.parametrize("name, orthogonal_ones", [("muon", 12), ("adamw", 0)])
def test_every_weight_has_one_optimizer_and_muon_the_matrices_of_the_layers(lm, name,
                                                                             orthogonal_ones):
    optimizer = pretrain.make_optimizer(lm, pretrain.Config(optimizer=name))
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) and set(held) == set(lm.parameters())
    by_muon = [p for part in optimizer.parts if isinstance(part, Muon)
               for group in part.param_groups for p in group["params"]]
    assert len(by_muon) == orthogonal_ones
    assert all(p.shape in {(32, 32), (64, 32), (32, 64)} for p in by_muon)


def test_a_saved_state_of_another_shape_is_refused(lm, tmp_path):
    optimizer = pretrain.make_optimizer(lm, pretrain.Config())
    for p in lm.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    memory = next(kept for kept in optimizer.state.values() if "memory" in kept)
    memory["memory"] = memory["memory"][:1]
    runs.save_state(tmp_path, runs.State(before={"scores": {"loss": 1.0}}), lm, optimizer)
    with pytest.raises(ValueError, match="another shape"):
        runs.load_state(tmp_path, lm, pretrain.make_optimizer(lm, pretrain.Config()))
