"""The training loop for every objective: masked LM, next sentence, classification."""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from accelerate.utils.memory import find_executable_batch_size, should_reduce_batch_size
from peft.tuners.lora import LoraLayer
from transformers import get_scheduler

from bert_encoding.core.seeds import derive_seed, generator

SCHEDULES = ("constant", "linear", "cosine")
HEADS = {"classifier", "pooler", "seq_relationship"}  # without L2-SP: often new, and no word vector depends on them

Batch = TypeVar("Batch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How to train; ``TrialConfig`` documents and checks the settings."""

    lr: float
    epochs: int
    batch_size: int
    accumulation: int
    weight_decay: float
    warmup_epochs: float
    schedule: str
    max_grad_norm: float
    precision: str
    l2_sp: float = 0.0


class Progress(NamedTuple):
    """After an epoch: optimiser steps and tokens so far, and the current number of items per micro-batch."""

    epoch: int
    optimizer_steps: int
    tokens_seen: int
    micro_batch: int = 0


class Objective(Protocol[Batch]):
    """What is learned: items from which steps are drawn, and the losses on them.

    ``draw`` makes a whole step and draws all its random numbers item by item, so the step does not depend on how
    ``split`` cuts it into micro-batches.
    """

    @property
    def n_items(self) -> int:
        """Number of items in an epoch."""
        ...

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> Batch:
        """Return these items as one batch, the whole step."""
        ...

    def split(self, batch: Batch, size: int) -> list[Batch]:
        """Cut a step into micro-batches of ``size`` items; the last one may be smaller."""
        ...

    def n_terms(self, batch: Batch) -> dict[str, int]:
        """Return the number of terms of each loss (masked tokens, pairs, texts), before ``losses`` is called."""
        ...

    def losses(
        self, model: Any, batch: Batch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        """Return each loss as the sum over its terms, and the number of terms."""
        ...

    def n_tokens(self, batch: Batch) -> int:
        """Return the number of tokens that the model reads, without padding."""
        ...


def train(
    model: torch.nn.Module,
    objective: Objective[Batch],
    training: Training,
    seed: int,
    device: torch.device,
    steps_per_epoch: int | None = None,
) -> Iterator[Progress]:
    """Train the parameters of ``model`` that require gradients, in place with AdamW, and yield after every epoch.

    A step takes ``batch_size * accumulation`` items. Its loss adds up, over the named losses, (sum over all
    micro-batches / number of terms in all micro-batches), so accumulation gives exactly the gradient of the big batch.
    If a step does not fit into memory, it is repeated with half the micro-batch, as often as needed, and the smaller
    size is used from then on; the gradient is the same except for dropout, which is drawn for every micro-batch.

    Raises FloatingPointError, which names step and epoch, if a loss is not finite; MemoryError if not even a single
    item at a time fits.

    Parameters
    ----------
    steps_per_epoch : number of steps of an epoch, on a seeded sample of the items without replacement, or on several
        passes if there are too few items; None is one pass
    """
    if objective.n_items < 1 or (steps_per_epoch is not None and steps_per_epoch < 1):
        raise ValueError(f"nothing to train on: {objective.n_items} items, {steps_per_epoch} steps per epoch")
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.lr, weight_decay=training.weight_decay)
    step_size = training.batch_size * training.accumulation
    n_steps = steps_per_epoch or -(-objective.n_items // step_size)
    n_drawn = objective.n_items if steps_per_epoch is None else n_steps * step_size
    scheduler = get_scheduler(
        "constant_with_warmup" if training.schedule == "constant" else training.schedule,
        optimizer,
        round(training.warmup_epochs * n_steps),
        training.epochs * n_steps,
    )
    gradient = _Gradient(model, objective, training, device)
    steps, tokens = 0, 0
    for epoch in range(1, training.epochs + 1):
        torch.manual_seed(derive_seed(seed, "dropout", epoch))
        epoch_rng = generator(seed, "masking", epoch)
        order = _order(objective.n_items, n_drawn, generator(seed, "windows", epoch))
        model.train()
        for start in range(0, n_drawn, step_size):
            batch = objective.draw(order[start : start + step_size], epoch_rng)
            steps, tokens = steps + 1, tokens + objective.n_tokens(batch)
            gradient.compute(batch, f"step {steps} of epoch {epoch}")
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        yield Progress(epoch, steps, tokens, gradient.micro_batch)


def _order(n_items: int, n_drawn: int, rng: np.random.Generator) -> list[int]:
    """Return ``n_drawn`` items in passes over all items, each pass in a new random order."""
    passes = [rng.permutation(n_items) for _ in range(-(-n_drawn // n_items))]
    return np.concatenate(passes)[:n_drawn].tolist()


class _Gradient(Generic[Batch]):
    """Computes the gradient of a step's loss, and remembers the micro-batch that fits into memory."""

    def __init__(
        self, model: torch.nn.Module, objective: Objective[Batch], training: Training, device: torch.device
    ) -> None:
        self.model, self.objective, self.device = model, objective, device
        self.precision, self.l2_sp = training.precision, training.l2_sp
        self.penalties = l2_sp_terms(model) if training.l2_sp else []
        self.micro_batch = training.batch_size

    def compute(self, batch: Batch, step: str) -> None:
        """Add up the gradient of one step in the parameters; ``step`` names it in messages."""
        random_state = _random_state(self.device)
        try:
            loss = self._accumulate(batch, self.micro_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            loss = None  # retry outside this block: the error keeps the tensors of the failed pass alive
        if loss is None:
            loss = self._accumulate_in_smaller_parts(batch, random_state, step)
        loss += self._penalise()
        if not np.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at {step}; lower lr")

    def _accumulate(self, batch: Batch, size: int) -> float:
        """Return the loss of the step; each micro-batch adds its part of the gradient."""
        terms = self.objective.n_terms(batch)
        counted, loss = dict.fromkeys(terms, 0), 0.0
        for part in self.objective.split(batch, size):
            sums = self.objective.losses(self.model, part, self.precision, self.device)
            share = torch.stack([total / max(terms[name], 1) for name, (total, _) in sums.items()]).sum()
            share.backward()  # type: ignore[no-untyped-call]
            loss += float(share.detach())
            counted = {name: counted[name] + n for name, (_, n) in sums.items()}
        if counted != terms:
            raise RuntimeError(f"expected loss terms {terms}, got {counted}")
        return loss

    def _accumulate_in_smaller_parts(self, batch: Batch, random_state: list[torch.Tensor], step: str) -> float:
        """Repeat the step with half the micro-batch, and halve again until it fits."""

        def halve() -> int:
            self.micro_batch //= 2
            return self.micro_batch

        def attempt(size: int) -> float:
            self.model.zero_grad(set_to_none=True)
            _set_random_state(random_state, self.device)
            return self._accumulate(batch, size)

        try:
            run = find_executable_batch_size(attempt, starting_batch_size=halve(), reduce_batch_size_fn=halve)
            loss: float = run()
        except RuntimeError:
            if self.micro_batch:
                raise
            raise MemoryError(f"out of memory at {step}, even with one item at a time; shorten the windows") from None
        logger.warning("out of memory at %s: micro-batches of %d from here on", step, self.micro_batch)
        return loss

    def _penalise(self) -> float:
        """Add the gradient of the L2-SP penalty and return its value."""
        total = torch.zeros((), device=self.device)
        for term in self.penalties:
            penalty = self.l2_sp / 2 * term()
            penalty.backward()  # type: ignore[no-untyped-call]
            total += penalty.detach()
        return float(total)


def _random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the state of the generators that dropout uses, on the CPU and on a GPU in use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def l2_sp_terms(model: torch.nn.Module) -> list[Callable[[], torch.Tensor]]:
    """Return functions of the squared distances ``||W - W_start||^2`` of trainable weights from their values now.

    L2-SP penalises the distance from the start instead of from 0 (Li, Grandvalet & Davoine 2018, equation 4, without
    its second term: heads are not penalised). Of an adapter, the effective update ``s B A`` counts, since A and B have
    no scale of their own; the magnitudes of DoRA count like weights, since its rows have unit length.
    """
    terms: list[Callable[[], torch.Tensor]] = []
    low_rank = set()
    for layer in model.modules():
        if isinstance(layer, LoraLayer):
            for name in layer.active_adapters:
                b, a = layer.lora_B[name].weight, layer.lora_A[name].weight
                start = b.detach().clone(), a.detach().clone()
                terms.append(partial(_update_distance, (b, a), start, layer.scaling[name]))
                low_rank |= {id(b), id(a)}
    for name, p in model.named_parameters():
        if p.requires_grad and id(p) not in low_rank and not HEADS & set(name.split(".")):
            terms.append(partial(_distance, p, p.detach().clone()))
    return terms


def _distance(p: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    return (p - start).square().sum()


def _update_distance(
    now: tuple[torch.Tensor, torch.Tensor], start: tuple[torch.Tensor, torch.Tensor], scale: float
) -> torch.Tensor:
    """Return ``||s (B A - B_start A_start)||^2`` as the trace of (2r, 2r) matrices, never forming B A.

    With C = [B, -B_start] and E = [A; A_start] the norm is tr(E' C' C E) = sum of the products of C'C and E E'.
    """
    c = torch.cat([now[0], -start[0]], dim=1)  # (n_out, 2r)
    e = torch.cat([now[1], start[1]])  # (2r, n_in)
    return scale**2 * ((c.T @ c) * (e @ e.T)).sum()
