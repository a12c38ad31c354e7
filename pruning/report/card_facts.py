"""What the model card of an export says, before it is put into words."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Quality = Mapping[str, Mapping[str, Mapping[str, Any]]]  # text -> model -> field -> value


@dataclass(frozen=True)
class CardFacts:
    """What a card says; nothing on it comes from elsewhere.

    Attributes:
      model: name of the base model: its repository, else its folder.
      repository: OWNER/NAME on the Hugging Face Hub, None if unknown.
      revision: commit of the repository, None if unknown.
      inherited: front matter of the base's own card that stays true: licence, languages.
      has_base_card: whether the folder holds that card as BASE_README.md.
      model_hash: fingerprint of the base's weights, 64 hexadecimal digits.
      plan_hash: SHA-256 of plan.safetensors.
      provenance: of the plan.
      family: model type of the base.
      written_as: model type in the folder's config.json.
      form: name of the format.
      group_size: weights per scale, None in 16 bits.
      quantizer: "rtn", "gptq", or None in 16 bits.
      channels, channels_kept: of the routed experts.
      widths: fewest and most channels that an expert keeps.
      experts, emptied: routed experts, and how many of them keep no channel.
      has_constants: whether those add a constant.
      parameters, parameters_left, parameters_stored: of the base; after pruning; and in the
        folder, where padding counts.
      source_bytes, written_bytes: of weight files and index.
      clients: client -> (verdict, rule), of `convert.clients`.
      mtp: what has become of the layers that predict further tokens, None if the base has none.
      mtp_width: channels of each of their experts.
      has_linear_attention: whether some layers attend linearly, which stay in 16 bits.
      has_latent_attention: whether attention is multi-head latent.
      has_tokenizer: whether the folder holds one.
      quality: per text the dense model, the pruned one and this folder, None before measuring.
      evaluation: window and stride in tokens, and what of the texts calibration has seen.
      version: of moe-jax.
    """

    model: str
    repository: str | None
    revision: str | None
    inherited: Mapping[str, Any]
    has_base_card: bool
    model_hash: str
    plan_hash: str
    provenance: Mapping[str, Any]
    family: str
    written_as: str
    form: str
    group_size: int | None
    quantizer: str | None
    channels: int
    channels_kept: int
    widths: tuple[int, int]
    experts: int
    emptied: int
    has_constants: bool
    parameters: int
    parameters_left: int
    parameters_stored: int
    source_bytes: int
    written_bytes: int
    clients: Mapping[str, tuple[str, str]]
    mtp: str | None
    mtp_width: int
    has_linear_attention: bool
    has_latent_attention: bool
    has_tokenizer: bool
    quality: Quality | None
    evaluation: Mapping[str, Any]
    version: str

    @property
    def shape(self) -> str:
        """ragged, layered or padded."""
        return self.form.partition("-")[0]

    @property
    def bits(self) -> str:
        """bf16, int4 or mxfp4."""
        return self.form.partition("-")[2]

    @property
    def removed(self) -> float:
        """Share of the expert channels that is gone."""
        return 1 - self.channels_kept / self.channels
