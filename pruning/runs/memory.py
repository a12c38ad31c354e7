"""How much memory each stage of a compression takes, from shapes alone."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import jax.numpy as jnp
import numpy as np

from convert.description import Description
from convert.export_format import ExportFormat
from moe_jax.experts.dispatch import padded_rows
from moe_jax.experts.grouped_matmul import on_cpu
from pruning.budget.candidates import CANDIDATES
from pruning.budget.plan import PruningPlan
from pruning.kit.memory import AMPLE, Allowance
from pruning.recipe.recipe import ResolvedRecipe
from pruning.report.cost_tables import STAGES
from pruning.runs.held import (
    GRADIENT_PROGRAMS,
    LOSS_LOGITS,
    Held,
    between_bytes,
    copied_bytes,
    details_bytes,
    evaluation_bytes,
    experts_at_once,
    export_bytes,
    fixed_bytes,
    gram_bytes,
    kept_between,
    largest_layer,
    layers_held,
    logits_held,
    outer_weights,
    pruned_bytes,
    rows_at_work,
    sample_bytes,
    sample_states,
    verify_bytes,
)
from pruning.runs.probe import kept_out_tokens
from pruning.scores import grams
from pruning.scores.end_to_end import ig_chunk
from pruning.scores.noise import ROWS_PER_EXPERT
from pruning.scores.parts import rows_of_parts, windows_at_work
from pruning.scores.states import (
    MEMORY_PROJECTIONS,
    MEMORY_STATES,
    layer_slots,
    projection_bytes,
    projection_room,
)
from pruning.shrink.gptq import MOMENT_BYTES, moments_of_expert
from pruning.shrink.progress import HELD_OUT
from pruning.stages.between_sizes import in_memory, of_gptq, of_repair
from pruning.stages.client import client_bytes
from pruning.stages.preflight import rehearsed_plan
from pruning.stages.probe_windows import probe_shapes
from pruning.stages.rule_losses import SHARE, STATE_BYTES, is_repaired
from pruning.stages.scoring_sizes import statistics_bytes
from pruning.stages.size_bounds import equal_export
from pruning.stages.sizes import export_of, form_of, sample_memory

LATE_BYTES = 300 << 20  # programs of all stages before the last ones, which stay
SAMPLE_PROGRAMS = 200 << 20  # that write on: of two models, for a prompt and for one more token
WINDOW_LOGITS = 3  # copies of a whole window's, in the loss that gradients begin with


def memory(
    base: Description, recipe: ResolvedRecipe, allowance: Allowance = AMPLE
) -> dict[str, int]:
    """Peak bytes of the host in each stage of `compress`; estimates, 0 for one that is not run.

    "transformers" is what the process takes that is asked about an export, if so much is free; all
    others are the process of `compress`.
    """
    return Foretold(base, recipe).peaks(STAGES, allowance)


ADAPT = ("transformers", "sample")  # what is left out where it does not fit


@dataclass(eq=False)
class Foretold:
    """Peak bytes of the host in each stage of a recipe; estimates, 0 for one that is not run.

    Attributes:
      base: the dense model.
      recipe: a resolved one.
      alone: whether a stage has a process of its own, without what earlier ones leave.
      rates: prune rates that are planned at once.
      plan: what is kept, None before it is known.
      allowance: what may be spent, of `peaks`.
    """

    base: Description
    recipe: ResolvedRecipe
    alone: bool = False
    rates: int = 1
    plan: PruningPlan | None = None
    allowance: Allowance = AMPLE

    def peaks(self, stages: Iterable[str], allowance: Allowance) -> dict[str, int]:
        """Those of some stages under an allowance, by name."""
        self.allowance = allowance
        return {stage: getattr(self, stage)() for stage in stages}

    def scoring(self) -> int:
        """Two layers, the rows at work, a layer's sums of all parts and, for obs, its Grams or,
        between layers, the logits of a window's loss; beside them the hidden states that a sweep
        holds. Or, once the text is through, the sums of all layers: of the text, of a part, of two
        halves and of what becomes of them, and a plan's scores."""
        recipe, c = self.recipe, self.base.config
        sums = statistics_bytes(self.base, recipe)
        windows = 0 if recipe.weights_only else math.ceil(recipe.max_tokens / recipe.window)
        parts = rows_of_parts(windows, recipe.until_stable is not None)
        batch, padded = windows_at_work(parts, recipe.batch)
        step = batch * recipe.window
        rows = step * c.moe.experts_per_token
        if recipe.weights_only:
            rows = padded_rows(c.moe.num_experts * ROWS_PER_EXPERT, c.moe.num_experts)
        # Elsewhere products are of all rows at once, on a CPU of a tile.
        wide = (3 * c.moe.d_expert + c.d_model) if on_cpu() else 4 * (c.moe.d_expert + c.d_model)
        work = 4 * rows * wide + max(1, len(parts)) * sums // len(c.moe_layers)
        if recipe.weight_gradients:  # weights as float32, their gradients, and those of a batch
            work += 3 * 4 * 3 * c.moe.num_experts * c.moe.d_expert * c.d_model
        if recipe.obs:
            work += gram_bytes(c, self.allowance)
        if recipe.expert_details:
            work += details_bytes(c, step)
        layer = self._largest(not recipe.groups - {"weights-only", "obs", "gradients"})
        work += layers_held(layer, 2, self.allowance) + copied_bytes(layer)
        held = self._held_states(windows, padded // batch, step)
        held += between_bytes(c, padded * recipe.window, self.allowance)
        if recipe.gradients and self.allowance.experts:  # those at the routing weights
            held += padded * recipe.window * c.moe.experts_per_token * 4
        fixed = self._fixed + any(self._backward) * GRADIENT_PROGRAMS
        return int(fixed + max(max(work, self._window_loss()) + held, 6 * sums))

    def planning(self) -> int:
        """The sums of all layers, and what becomes of them."""
        return self._fixed + 6 * statistics_bytes(self.base, self.recipe)

    def choice(self) -> int:
        """Two layers, the hidden states of plans that share a reading twice, a batch at work, the
        experts of a layer without what is masked, what a sample of the text takes where
        kept channels take over, and the logits, whose turn comes when the heap still holds that;
        0 if no rule is measured."""
        recipe, c, item = self.recipe, self.base.config, self._item
        tokens = kept_out_tokens(recipe)
        if not tokens:
            return 0
        states = tokens * c.d_model * item
        plans = 1 + self.rates * len(CANDIDATES)
        together = max(1, min(plans, self.allowance.of(STATE_BYTES) // states))
        pool = experts_at_once(c, self.allowance) * c.moe.d_expert * c.d_model
        work = rows_at_work(c, recipe, tokens) * (3 * c.moe.d_expert + 3 * c.d_model) * 4
        work += 3 * 2 * pool + logits_held(c, LOSS_LOGITS)
        work += together * kept_between(c, tokens, self.allowance)
        if is_repaired(recipe):
            work += sample_bytes(c, recipe, SHARE, self.allowance) + pool * (2 * 4 + item)
        layers = layers_held(self._largest(True), 2, self.allowance)
        return int(self._fixed + layers + 2 * together * states + work)

    def repair(self) -> int:
        """Beside a pruned layer: the states of two models, inputs and lacks of the experts and one
        of them on its way to the device, where each copy of a token goes, three candidates of a
        layer, and the Grams of its experts with their eigenvectors, or of one if those of others
        are made again; of a layer in groups, what lies between them."""
        recipe, c = self.recipe, self.base.config
        if recipe.repair == "none":
            return 0
        states = recipe.max_tokens * c.d_model * (3 * self._item + 3 * 4)
        states += recipe.max_tokens * c.moe.experts_per_token * (3 * 4 + 2 * 8)
        counts = self._plan.counts
        squares = 5 * 8 * np.square(counts)
        grams = max(int(squares.max()), self.allowance.of(int(squares.sum(axis=1).max())))
        kept = int(counts.sum(axis=1).max())
        between = in_memory(of_repair(c, recipe.max_tokens, kept), self.allowance)
        layers = self._pruned(True) + 3 * 2 * self._largest(True).own
        return self._late + layers + states + grams + between

    def gptq(self) -> int:
        """Beside a pruned layer: moments of some experts, and the states of the text; of a layer in
        groups, what lies between them."""
        recipe, c = self.recipe, self.base.config
        if recipe.quantizer != "gptq" or not self._packs:
            return 0
        states = recipe.max_tokens * c.d_model * self._item
        held = -(-recipe.max_tokens // HELD_OUT)
        sizes = of_gptq(c, recipe.max_tokens, held, recipe.group_size)
        between = in_memory(sizes, self.allowance)
        each = moments_of_expert(c.d_model, c.moe.d_expert)
        moments = max(
            each, min(self.allowance.of(MOMENT_BYTES), experts_at_once(c, self.allowance) * each)
        )
        return self._fixed + self._pruned(True) + 2 * moments + states + between

    def export(self) -> int:
        """As of `export_bytes`."""
        return export_bytes(self.base, self.allowance, self._exports_groups)

    def verify(self) -> int:
        """As of `verify_bytes`, beside what is left of other stages."""
        found = verify_bytes(self.base, self.allowance, self._exports_groups)
        return self._late - self._fixed + found

    def transformers(self) -> int:
        """What the process takes that is asked about an export."""
        shapes = probe_shapes(self.base.config)
        exports = [export_of(self.base, self._plan, form) for form in self._forms]
        return max(client_bytes(one, shapes) for one in exports)

    def evaluation(self) -> int:
        """Layers pruned on the fly, or as float32 where weights have 4 bits, and the texts."""
        recipe = self.recipe
        layers = self._pruned(True)
        if self._packs:
            layers = max(layers, layers_held(self._largest(True), 4, self.allowance))
        # Windows of texts that are named lie half over each other.
        tokens = (2 * len(recipe.evaluation) or 1) * recipe.evaluation_tokens
        texts = evaluation_bytes(
            self.base.config, tokens, recipe.batch * recipe.window, layers, self.allowance
        )
        return self._late + 2 * self._outer + texts

    def sample(self) -> int:
        """Texts are continued by whole models, where they are small enough."""
        base, forms = self.base, self._forms
        # A plan of unequal layers may leave one whole, whose rows all others then have.
        if self.recipe.width == "uniform":
            written = [export_of(base, self._plan, form) for form in forms]
        else:
            written = [equal_export(base, form, base.config.moe.d_expert) for form in forms]
        found = max(sample_memory(base, one) for one in written)
        return self._late + SAMPLE_PROGRAMS + found if found else 0

    @cached_property
    def _plan(self) -> PruningPlan:
        return self.plan or rehearsed_plan(self.recipe, self.base)

    @cached_property
    def _forms(self) -> list[ExportFormat]:
        return [form_of(self.recipe, name) for name in self.recipe.export]

    @property
    def _packs(self) -> bool:
        return any(form.is_packed for form in self._forms)

    @property
    def _exports_groups(self) -> bool:
        """Whether layers are written in groups of experts: not into one tensor of all experts."""
        return all(export_of(self.base, self._plan, form).by_group for form in self._forms)

    @property
    def _item(self) -> int:
        """Bytes of a number of the hidden states."""
        return jnp.dtype(self.recipe.dtype).itemsize

    @property
    def _outer(self) -> int:
        return outer_weights(self.base.config)

    @property
    def _fixed(self) -> int:
        return fixed_bytes(self.base)

    @property
    def _late(self) -> int:
        return self._fixed + (0 if self.alone else LATE_BYTES)

    def _largest(self, by_group: bool) -> Held:
        return largest_layer(self.base, self.allowance, by_group)

    def _pruned(self, by_group: bool) -> int:
        return pruned_bytes(self.base, self._largest(by_group), self.allowance)

    def _window_loss(self) -> int:
        """The logits of a window, where the loss of the whole model is taken."""
        recipe, c = self.recipe, self.base.config
        if not any((*self._backward, recipe.nll_ablate)):
            return 0
        return 4 * c.vocab_size * (c.d_model + WINDOW_LOGITS * recipe.window)

    @property
    def _backward(self) -> tuple[bool, ...]:
        """Scores that differentiate the loss of the whole model, layer by layer."""
        recipe = self.recipe
        return recipe.gradients, recipe.weight_gradients, recipe.nll_ig is not None

    def _held_states(self, windows: int, batches: int, step: int) -> int:
        """Most bytes that a sweep over the text keeps in memory between its layers.

        That of the statistics has its states in a file and keeps projections alone, of whole
        layers; that of obs, where it is added to statistics, has a sample. Others hold the text
        once or twice, and the states of a way down, or of models without an expert, if they are not
        too large.
        """
        c, recipe = self.base.config, self.recipe
        text = windows * recipe.window * c.d_model * self._item
        room, found = self.allowance.of(MEMORY_STATES), [0]
        if recipe.nll_ablate:
            without = len(c.moe_layers) * c.moe.num_experts
            found.append((1 + max(1, min(without, room // max(1, text) - 1))) * text)
        if recipe.obs:
            found.append(sample_states(c, recipe, grams.SHARE, self.allowance))
        if recipe.gradients and not self.allowance.experts:
            rows = projection_room(c, batches, step) * projection_bytes(c.moe, step)
            found.append(min(rows, self.allowance.of(MEMORY_PROJECTIONS)))
        if recipe.weight_gradients:
            found.append(text + _within(room, layer_slots(c) * text))
        if recipe.nll_ig:
            shown = text * recipe.nll_ig * min(1, ig_chunk(recipe.nll_ig) / max(1, windows))
            found.append(int(2 * shown) + _within(room, int(layer_slots(c) * shown)))
        return max(found)


def _within(room: int, states: int) -> int:
    return states if states <= room else 0
