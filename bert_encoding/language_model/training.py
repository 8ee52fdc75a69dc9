"""The one training loop, for every objective: masked LM, next sentence, classification."""

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
HEADS = {"classifier", "pooler", "seq_relationship"}  # free of L2-SP: often new, and no word vector depends on them

Batch = TypeVar("Batch")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Training:
    """How to train; ``TrialConfig`` says what each means and checks it."""

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
    """After an epoch: optimiser steps and tokens so far, and how many items a micro-batch holds by now."""

    epoch: int
    optimizer_steps: int
    tokens_seen: int
    micro_batch: int = 0


class Objective(Protocol[Batch]):
    """What is learnt: items to draw a step from, and the losses on them.

    ``draw`` makes a whole step, and draws all that is random about it, item by item: so it does not depend on how
    ``split`` cuts the step into micro-batches. ``n_terms`` foretells the counts that ``losses`` returns.
    """

    @property
    def n_items(self) -> int:
        """How many items an epoch goes through."""
        ...

    def draw(self, indices: Sequence[int], epoch_rng: np.random.Generator) -> Batch:
        """Return these items as one batch, the step's."""
        ...

    def split(self, batch: Batch, size: int) -> list[Batch]:
        """Cut a step into micro-batches of ``size`` items, the last one perhaps of fewer."""
        ...

    def n_terms(self, batch: Batch) -> dict[str, int]:
        """Return how many terms each loss will have: masked tokens, pairs, texts."""
        ...

    def losses(
        self, model: Any, batch: Batch, precision: str, device: torch.device
    ) -> dict[str, tuple[torch.Tensor, int]]:
        """Return each loss as the sum over its terms, with their number."""
        ...

    def n_tokens(self, batch: Batch) -> int:
        """Return the tokens that the model reads, without padding."""
        ...


def train(
    model: Any,
    objective: Objective[Batch],
    training: Training,
    seed: int,
    device: torch.device,
    steps_an_epoch: int | None = None,
) -> Iterator[Progress]:
    """Train the parameters of ``model`` that require gradients, in place with AdamW, and yield after every epoch.

    A step takes ``batch_size * accumulation`` items. Its loss is the sum over the losses' names of (sum over all
    micro-batches / number of terms in all micro-batches), so that accumulation is exactly the big batch. A step that
    does not fit into memory is done again with half the micro-batch, as often as needed, and the smaller size is kept;
    the gradient stays the same but for dropout, which is drawn for every micro-batch.

    Parameters
    ----------
    steps_an_epoch : an epoch is exactly so many steps, on a seeded sample of the items without replacement, or on
        several passes if there are too few; None is one pass

    Raises
    ------
    FloatingPointError
        if a loss is not finite; the message names step and epoch.
    MemoryError
        if not even a single item at a time fits.
    """
    if objective.n_items < 1 or (steps_an_epoch is not None and steps_an_epoch < 1):
        raise ValueError(f"nothing to train on: {objective.n_items} items, {steps_an_epoch} steps an epoch")
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=training.lr, weight_decay=training.weight_decay)
    items_a_step = training.batch_size * training.accumulation
    n_steps = -(-objective.n_items // items_a_step) if steps_an_epoch is None else steps_an_epoch
    scheduler = _schedule(optimizer, training, n_steps)
    gradient = _Gradient(model, objective, training, device)
    steps, tokens = 0, 0
    for epoch in range(1, training.epochs + 1):
        torch.manual_seed(derive_seed(seed, "dropout", epoch))
        epoch_rng = generator(seed, "masking", epoch)
        n_wanted = objective.n_items if steps_an_epoch is None else n_steps * items_a_step
        order = _order(objective.n_items, n_wanted, generator(seed, "windows", epoch))
        model.train()
        for start in range(0, n_wanted, items_a_step):
            batch = objective.draw(order[start : start + items_a_step], epoch_rng)
            steps, tokens = steps + 1, tokens + objective.n_tokens(batch)
            gradient.compute(batch, f"step {steps} of epoch {epoch}")
            torch.nn.utils.clip_grad_norm_(trainable, training.max_grad_norm)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad(set_to_none=True)
        yield Progress(epoch, steps, tokens, gradient.micro_batch)


def _order(n_items: int, n_wanted: int, rng: np.random.Generator) -> list[int]:
    """Return ``n_wanted`` items, none a second time before all had their turn."""
    passes = [rng.permutation(n_items) for _ in range(-(-n_wanted // n_items))]
    return np.concatenate(passes)[:n_wanted].tolist()


def _schedule(optimizer: torch.optim.Optimizer, training: Training, steps_an_epoch: int) -> Any:
    name = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    warmup = round(training.warmup_epochs * steps_an_epoch)
    return get_scheduler(name, optimizer, warmup, training.epochs * steps_an_epoch)


class _Gradient(Generic[Batch]):
    """Leaves the gradient of a step's loss in the parameters, and remembers the micro-batch that fits into memory."""

    def __init__(self, model: Any, objective: Objective[Batch], training: Training, device: torch.device) -> None:
        self.model, self.objective, self.device = model, objective, device
        self.precision, self.l2_sp = training.precision, training.l2_sp
        self.penalties = l2_sp_terms(model) if training.l2_sp else []
        self.micro_batch = training.batch_size

    def compute(self, batch: Batch, where: str) -> None:
        """Add up the gradient of one step; ``where`` names it in messages."""
        dropout = _random_state(self.device)
        try:
            loss = self._accumulate(batch, self.micro_batch)
        except RuntimeError as error:
            if not should_reduce_batch_size(error):
                raise
            loss = None  # leave this block first: the error holds on to what the failed pass computed
        if loss is None:
            loss = self._accumulate_in_smaller_parts(batch, dropout, where)
        loss += self._penalise()
        if not np.isfinite(loss):
            raise FloatingPointError(f"the training loss is {loss} at {where}; lower lr")

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
            raise RuntimeError(f"the losses have {counted} terms where {terms} were foretold")
        return loss

    def _accumulate_in_smaller_parts(self, batch: Batch, dropout: list[torch.Tensor], where: str) -> float:
        """Begin the step anew with half the micro-batch, and halve on until it fits."""

        def halve() -> int:
            self.micro_batch //= 2
            return self.micro_batch

        def attempt(size: int) -> float:
            self.model.zero_grad(set_to_none=True)
            _set_random_state(dropout, self.device)
            return self._accumulate(batch, size)

        try:
            run = find_executable_batch_size(attempt, starting_batch_size=halve(), reduce_batch_size_fn=halve)
            loss: float = run()
        except RuntimeError:
            if self.micro_batch:
                raise
            raise MemoryError(f"out of memory at {where}, even with one item at a time; shorten the windows") from None
        logger.warning("out of memory at %s: micro-batches of %d from here on", where, self.micro_batch)
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
    """Return the state from which dropout is drawn, on the CPU and on a GPU in use."""
    states = [torch.get_rng_state()]
    return [*states, torch.cuda.get_rng_state(device)] if device.type == "cuda" else states


def _set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    torch.set_rng_state(states[0])
    for state in states[1:]:
        torch.cuda.set_rng_state(state, device)


def l2_sp_terms(model: Any) -> list[Callable[[], torch.Tensor]]:
    """Return functions that give the squared distances ``||W - W_start||^2`` of what trains, now being the start.

    Keeping the weights near where they started, not near 0, is L2-SP (Li, Grandvalet & Davoine 2018, equation 4,
    without its second term: heads are left free). An adapter counts with its effective update ``s B A``, since A and B
    have no size of their own; the magnitudes of DoRA count like weights, their rows having unit length.
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
