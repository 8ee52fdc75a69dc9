"""The training loop: accumulation, memory that runs out, penalties and epochs of a set length, for any objective."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from make_trials import PEFT_WARNS, TRAINING
from peft import LoraConfig, PeftModel, get_peft_model
from torch.optim.optimizer import register_optimizer_step_pre_hook

from bert_encoding.core.seeds import generator
from bert_encoding.language_model.encoder import Encoder
from bert_encoding.language_model.lora import masked_lm
from bert_encoding.language_model.training import Progress, Training, l2_sp_terms, train

CPU = torch.device("cpu")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 20.00 GiB."

pytestmark = [pytest.mark.usefixtures("one_thread"), PEFT_WARNS]


class NoisyLines(NamedTuple):
    """A step of ``Lines``: rows of (x, y, weight of the second loss or 0)."""

    x: np.ndarray
    y: np.ndarray
    indices: np.ndarray


@dataclass
class Lines:
    """Two losses on a linear model: all items have the first, every third one has the second. No BERT, no wait."""

    n_items: int = 20
    drawn: list[list[int]] = field(default_factory=list)
    parts: list[int] = field(default_factory=list)
    fits: int = 1000

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> NoisyLines:
        self.drawn.append(list(indices))
        noise = np.array([epoch_rng.normal(size=3) for _ in indices])
        x = np.stack([np.cos(np.arange(3) * (i + 1)) for i in indices]) + 0.1 * noise
        return NoisyLines(x, x @ [1.0, -2.0, 0.5] + 3, np.array(indices))

    def split(self, batch: NoisyLines, size: int) -> list[NoisyLines]:
        starts = range(0, len(batch.x), size)
        return [NoisyLines(*(array[start : start + size] for array in batch)) for start in starts]

    def n_terms(self, batch: NoisyLines) -> dict[str, int]:
        return {"square": len(batch.x), "third": int((batch.indices % 3 == 0).sum())}

    def losses(
        self, model: Any, batch: NoisyLines, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        self.parts.append(len(batch.x))
        values = model(torch.from_numpy(batch.x).float())[:, 0]
        if len(batch.x) > self.fits:
            raise RuntimeError(OUT_OF_MEMORY)
        third = torch.from_numpy(batch.indices % 3 == 0)
        square = (values - torch.from_numpy(batch.y).float()).square()
        return {"square": (square.sum(), len(batch.x)), "third": (values[third].abs().sum(), int(third.sum()))}

    def n_tokens(self, batch: NoisyLines) -> int:
        return 10 * len(batch.x)


def line(dropout: float = 0.0) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(torch.nn.Dropout(dropout), torch.nn.Linear(3, 1))


def run(model: Any, objective: Any, training: Training, seed: int = 0, **options: Any) -> list[Progress]:
    return list(train(model, objective, training, seed, CPU, **options))


def weights(model: torch.nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.fixture
def gradients() -> Iterator[list[list[torch.Tensor]]]:
    """The gradients of every step, as AdamW receives them."""
    steps: list[list[torch.Tensor]] = []

    def listen(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        steps.append([p.grad.clone() for p in optimizer.param_groups[0]["params"] if p.grad is not None])

    hook = register_optimizer_step_pre_hook(listen)
    yield steps
    hook.remove()


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 2), (2, 4), (1, 8), (3, 2)])
def test_gradients_of_two_losses_equal_a_plain_loop(
    batch_size: int, accumulation: int, gradients: list[list[torch.Tensor]]
) -> None:
    """Terms are spread unevenly over micro-batches: one of them may hold none of the second loss."""
    objective, model = Lines(), line()
    start = [p.detach().clone() for p in model.parameters()]
    run(model, objective, replace(TRAINING, batch_size=batch_size, accumulation=accumulation, lr=0.0))
    order = generator(0, "windows", 1).permutation(20).tolist()
    size, plain, rng = batch_size * accumulation, Lines(), generator(0, "masking", 1)
    assert objective.drawn == [order[start : start + size] for start in range(0, 20, size)]
    assert len(gradients) == len(objective.drawn)
    for indices, gradient in zip(objective.drawn, gradients, strict=True):
        x, y, _ = plain.draw(indices, rng)
        weight, bias = (p.clone().double().requires_grad_() for p in start)
        values = [torch.from_numpy(row) @ weight[0] + bias[0] for row in x]
        squares = [(value - target) ** 2 for value, target in zip(values, y, strict=True)]
        thirds = [abs(value) for value, i in zip(values, indices, strict=True) if i % 3 == 0]
        (sum(squares) / len(squares) + sum(thirds) / max(len(thirds), 1)).backward()  # a step may lack one loss
        for ours, theirs in zip(gradient, (weight.grad, bias.grad), strict=True):
            torch.testing.assert_close(ours, theirs.float(), rtol=1e-6, atol=1e-6)


def test_losses_with_another_number_of_terms_are_refused() -> None:
    class Miscounted(Lines):
        def n_terms(self, batch: NoisyLines) -> dict[str, int]:
            return super().n_terms(batch) | {"third": 2}

    with pytest.raises(RuntimeError, match=r"expected loss terms .*, got"):
        run(line(), Miscounted(), TRAINING)


@pytest.mark.table
@pytest.mark.parametrize(("fits", "micro_batch"), [(7, 4), (4, 4), (3, 2), (1, 1)])
def test_smaller_micro_batches_give_the_same_gradients_and_are_kept(
    fits: int, micro_batch: int, gradients: list[list[torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    training = replace(TRAINING, batch_size=8, epochs=2)
    models = [line(), line()]
    with caplog.at_level(logging.WARNING):
        (first, last), expected = (run(m, Lines(fits=n), training) for m, n in zip(models, (fits, 1000), strict=True))
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-6)
    for small, large in zip(gradients[:6], gradients[6:], strict=True):
        for ours, theirs in zip(small, large, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    assert (first.micro_batch, last.micro_batch) == (micro_batch, micro_batch)
    assert [progress.micro_batch for progress in expected] == [8, 8]
    assert [progress[:3] for progress in (first, last)] == [progress[:3] for progress in expected]
    assert caplog.messages == [f"out of memory at step 1 of epoch 1: micro-batches of {micro_batch} from here on"]


def test_only_the_step_that_ran_out_is_repeated() -> None:
    objective = Lines(n_items=16, fits=4)
    run(line(), objective, replace(TRAINING, batch_size=8))
    assert objective.parts == [8, 4, 4, 4, 4]  # failed, the step again, the next step
    assert len(objective.drawn) == 2  # never drawn again


def test_memory_may_run_out_in_the_middle_of_a_step_and_later() -> None:
    class Crowded(Lines):
        """The third forward pass of all meets a full memory: the first half of its step is computed already."""

        def losses(self, *args: Any) -> dict[str, tuple[torch.Tensor, int]]:
            losses = super().losses(*args)
            if len(self.parts) == 4:
                raise torch.OutOfMemoryError(OUT_OF_MEMORY)
            return losses

    training = replace(TRAINING, batch_size=4, accumulation=2)
    models = [line(), line()]
    objective = Crowded(n_items=16)
    run(models[0], objective, training)
    run(models[1], Lines(n_items=16), training)
    assert objective.parts == [4, 4, 4, 4, 2, 2, 2, 2]
    torch.testing.assert_close(weights(models[0]), weights(models[1]), rtol=0, atol=1e-6)


def test_dropout_of_a_repeated_step_is_drawn_again() -> None:
    """The random state is restored: the result is that of a run with the smaller size from the start."""
    models = [line(dropout=0.5), line(dropout=0.5)]
    run(models[0], Lines(fits=2), replace(TRAINING, batch_size=8, epochs=2))
    run(models[1], Lines(), replace(TRAINING, batch_size=2, accumulation=4, epochs=2))
    assert torch.equal(weights(models[0]), weights(models[1]))


def test_a_single_item_that_does_not_fit_is_an_error_that_says_where() -> None:
    with pytest.raises(MemoryError, match=r"^out of memory at step 1 of epoch 1, even with one item at a time; "):
        run(line(), Lines(fits=0), TRAINING)


@pytest.mark.parametrize("errors", [["shapes do not match"], [OUT_OF_MEMORY, "shapes do not match"]])
def test_other_errors_are_not_taken_for_memory(errors: list[str]) -> None:
    class Broken(Lines):
        def losses(self, *args: Any) -> dict[str, tuple[torch.Tensor, int]]:
            super().losses(*args)
            raise RuntimeError(errors[len(self.parts) - 1])

    broken = Broken()
    with pytest.raises(RuntimeError, match="shapes do not match"):
        run(line(), broken, TRAINING)
    assert broken.parts == [4, 2][: len(errors)]


def penalty(terms: list[Callable[[], torch.Tensor]]) -> float:
    return float(sum(term().detach() for term in terms))


def disturb(model: torch.nn.Module, seed: int = 0, size: float = 0.1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += size * torch.randn_like(p)


def test_l2_sp_is_the_squared_distance_of_what_trains(tiny_encoder: Encoder) -> None:
    model = tiny_encoder.copy_model()
    for p in model.bert.embeddings.parameters():
        p.requires_grad = False
    terms = l2_sp_terms(model)
    assert penalty(terms) == 0
    disturb(model)
    pristine = dict(tiny_encoder.model.named_parameters())
    expected = sum(float((p - pristine[name]).detach().square().sum()) for name, p in model.named_parameters())
    assert expected > 1
    assert penalty(terms) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("start", ["fresh", "disturbed"])  # PiSSA and OLoRA start with B A above 0
@pytest.mark.parametrize("rslora", [False, True])
def test_l2_sp_of_an_adapter_is_that_of_its_effective_update(rslora: bool, start: str, tiny_encoder: Encoder) -> None:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["query", "value"], use_rslora=rslora, bias="lora_only")
    model = get_peft_model(tiny_encoder.copy_model(), config)
    if start == "disturbed":
        disturb(model, seed=3)
    before = merged(model)
    terms = l2_sp_terms(model)
    assert penalty(terms) == pytest.approx(0, abs=1e-5)
    disturb(model)
    after = merged(model)
    expected = sum(float((after[name] - before[name]).square().sum()) for name in before)
    assert expected > 0.1
    assert penalty(terms) == pytest.approx(expected, rel=1e-4)


def merged(model: PeftModel) -> dict[str, torch.Tensor]:
    """Weights with W + s B A multiplied out, by hand."""
    matrices = {}
    for name, layer in masked_lm(model).named_modules():
        if hasattr(layer, "lora_A"):
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            matrices[name] = (layer.base_layer.weight + layer.scaling["default"] * b @ a).detach().double()
            matrices[name + ".bias"] = layer.base_layer.bias.detach().clone().double()
    return matrices


def test_l2_sp_leaves_heads_free() -> None:
    model = torch.nn.ModuleDict({"bert": torch.nn.Linear(2, 2), "classifier": torch.nn.Linear(2, 2)})
    terms = l2_sp_terms(model)
    disturb(model["classifier"])
    assert penalty(terms) == 0
    disturb(model["bert"])
    assert penalty(terms) > 0


def test_l2_sp_adds_its_gradient_once_per_step(gradients: list[list[torch.Tensor]]) -> None:
    """The derivative of c / 2 ||p - p0||^2 is c (p - p0), however the step is cut."""
    models = [line(), line()]
    start = [p.detach().clone() for p in models[0].parameters()]
    places: list[list[torch.Tensor]] = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: places.append([p.detach().clone() for p in optimizer.param_groups[0]["params"]])
    )
    run(models[0], Lines(n_items=8), replace(TRAINING, batch_size=2, accumulation=2, l2_sp=0.7))
    hook.remove()
    with torch.no_grad():
        for p, place in zip(models[1].parameters(), places[1], strict=True):
            p.copy_(place)
    order = generator(0, "windows", 1).permutation(8).tolist()
    rng, objective = generator(0, "masking", 1), Lines(n_items=8)
    objective.draw(order[:4], rng)
    batch = objective.draw(order[4:], rng)
    sum(total / n for total, n in objective.losses(models[1], batch, "float32", CPU).values()).backward()
    for gradient, p, place, p0 in zip(gradients[1], models[1].parameters(), places[1], start, strict=True):
        assert float((place - p0).abs().max()) > 5e-3
        torch.testing.assert_close(gradient, p.grad + 0.7 * (place - p0), rtol=1e-5, atol=1e-6)


def test_an_epoch_of_so_many_steps_takes_a_sample_without_replacement() -> None:
    objective = Lines(n_items=20)
    results = run(line(), objective, replace(TRAINING, epochs=2, batch_size=2, accumulation=2), steps_per_epoch=3)
    assert results == [Progress(1, 3, 120, 2), Progress(2, 6, 240, 2)]
    assert [len(indices) for indices in objective.drawn] == [4] * 6
    epochs = [[i for step in steps for i in step] for steps in (objective.drawn[:3], objective.drawn[3:])]
    for epoch in epochs:
        assert len(set(epoch)) == 12
    assert epochs[0] != epochs[1]
    assert epochs[0] == generator(0, "windows", 1).permutation(20)[:12].tolist()


def test_an_epoch_of_more_steps_takes_several_passes() -> None:
    objective = Lines(n_items=6)
    results = run(line(), objective, TRAINING, steps_per_epoch=4)
    taken = [i for step in objective.drawn for i in step]
    assert results[0].optimizer_steps == 4
    assert [sorted(taken[start : start + 6]) for start in (0, 6)] == [list(range(6))] * 2
    assert len(taken) == 16
    assert len(set(taken[12:])) == 4


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("warmup_epochs", "n_warmup"), [(0, 0), (0.3, 1), (1.0, 4), (1.5, 6)])
@pytest.mark.parametrize(("n_items", "steps_per_epoch"), [(16, None), (20, 4)])
def test_learning_rates_follow_the_closed_form(
    schedule: str, warmup_epochs: float, n_warmup: int, n_items: int, steps_per_epoch: int | None
) -> None:
    lrs: list[float] = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, *_: lrs.append(optimizer.param_groups[0]["lr"]))
    training = replace(TRAINING, epochs=3, schedule=schedule, warmup_epochs=warmup_epochs)
    run(line(), Lines(n_items), training, steps_per_epoch=steps_per_epoch)
    hook.remove()
    expected = [1e-2 * step / n_warmup for step in range(n_warmup)]
    for step in range(12 - n_warmup):
        done = step / (12 - n_warmup)
        shares = {"constant": 1, "linear": 1 - done, "cosine": (1 + np.cos(np.pi * done)) / 2}
        expected.append(1e-2 * shares[schedule])
    np.testing.assert_allclose(lrs, expected, rtol=1e-12)


@pytest.mark.parametrize(("n_items", "steps"), [(0, None), (5, 0)])
def test_nothing_to_train_on_is_refused(n_items: int, steps: int | None) -> None:
    with pytest.raises(ValueError, match="nothing to train on"):
        run(line(), Lines(n_items=n_items), TRAINING, steps_per_epoch=steps)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_a_loss_that_is_not_finite_names_its_step(value: str) -> None:
    class Diverging(Lines):
        def losses(self, *args: Any) -> dict[str, tuple[torch.Tensor, int]]:
            losses = super().losses(*args)
            total, n = losses["third"]
            return losses | {"third": (total * (float(value) if len(self.parts) == 7 else 1), n)}

    model, places = line(), []
    hook = register_optimizer_step_pre_hook(lambda *_: places.append(weights(model)))
    with pytest.raises(FloatingPointError, match=rf"loss is {value} at step 7 of epoch 2; lower lr"):
        run(model, Diverging(), replace(TRAINING, epochs=2))
    hook.remove()
    assert len(places) == 6  # no step is taken with it
    assert torch.isfinite(weights(model)).all()


def test_seed_determines_the_weights_and_dropout_is_on() -> None:
    trained = []
    for seed, dropout in ((3, 0.3), (3, 0.3), (4, 0.3), (3, 0.0)):
        torch.rand(4)
        model = line(dropout)
        torch.rand(4)
        run(model, Lines(), TRAINING, seed)
        trained.append(weights(model))
    assert torch.equal(trained[0], trained[1])
    assert not torch.equal(trained[0], trained[2])
    assert not torch.equal(trained[0], trained[3])
