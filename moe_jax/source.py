"""Where the layers of a model come from, one at a time or in groups of their experts."""

from typing import Protocol, runtime_checkable

from moe_jax.config import ModelConfig
from moe_jax.transformer import DecoderLayer, Embedding, Head


class LayerSource(Protocol):
    """Where layers come from: a model in memory or a checkpoint on disk."""

    @property
    def config(self) -> ModelConfig:
        """The architecture."""
        ...

    @property
    def embedding(self) -> Embedding:
        """The token embedding."""
        ...

    @property
    def head(self) -> Head:
        """The final norm and vocabulary projection."""
        ...

    def __len__(self) -> int: ...

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index`, freshly read or already resident."""
        ...


@runtime_checkable
class InGroups(Protocol):
    """What a source may have beside: layers of which some experts are read at a time.

    A group is a layer whose `mlp.experts` are some of its experts, and whose `mlp.first` says
    which. The first one of a layer has all the rest of it, the others of that the norm and the
    router.
    """

    def groups(self, index: int) -> int:
        """Groups in which layer `index` is to be taken; 1 for a layer that is taken whole."""
        ...

    def group(self, index: int, number: int) -> DecoderLayer:
        """Group `number` of layer `index`, or the layer if it is taken whole."""
        ...


def groups_of(source: LayerSource, index: int) -> int:
    """Groups in which a source wants its layer `index` to be taken; 1 for whole."""
    return source.groups(index) if isinstance(source, InGroups) else 1


def group_of(source: LayerSource, index: int, number: int) -> DecoderLayer:
    """Group `number` of a layer, or the layer if it is taken whole."""
    return source.group(index, number) if isinstance(source, InGroups) else source.layer(index)
