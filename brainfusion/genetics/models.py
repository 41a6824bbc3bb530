"""The published DNA language models, in one table: what their numbers must look like.

A model is declared, never guessed: 4,096 is the width of four Evo 2 checkpoints, 512 that of
Caduceus-PS's raw output and of a Nucleotide Transformer. The width is only a check.

Sources: ArcInstitute/evo2 @53f1959 (`configs/*.yml`), GenerTeam/GENERator @96242a4 and the model
cards, kuleshov-group/caduceus @0060a6d (`modeling_caduceus.py`) and its hub configs, the hub
configs of DNABERT-2, Nucleotide Transformer and HyenaDNA.
"""

import re
from dataclasses import dataclass
from typing import Literal

from brainfusion.runtime.errors import UserError, nearest

StrandClass = Literal["none", "augmented", "equivariant"]
"""What the reverse complement of the input does to the output.

none: nothing is promised; average both strands. augmented: trained with both strands, still to be
averaged. equivariant: the output flips with the input (length and channels); fold it.
"""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What is known of one set of weights."""

    width: int
    """Hidden size: the width of a vector that is ready to use; 0 where any will do."""
    output_width: int
    """Width of a raw output position; twice `width` where both strands are stored side by side."""
    n_layers: int | None
    """Blocks; None leaves layer names unchecked (simulated files)."""
    token_unit: str
    """What one token covers: "bp", "6-mer" (not overlapping), "BPE", or "" where any will do."""
    context_bp: int | None
    """Longest input in base pairs; None where tokens have no fixed length."""
    strand_class: StrandClass
    dtype: str
    """Type in which the published code computes the output."""


SIMULATED = "simulated"
"""The checkpoint name of a simulated cohort's files, in every family."""

# fmt: off
REGISTRY: dict[str, dict[str, Checkpoint]] = {
    "evo2": {
        "evo2_1b_base":          Checkpoint(1920, 1920, 25, "bp", 8_192, "none", "bfloat16"),
        "evo2_7b_base":          Checkpoint(4096, 4096, 32, "bp", 32_768, "none", "bfloat16"),
        "evo2_7b_microviridae":  Checkpoint(4096, 4096, 32, "bp", 32_768, "none", "bfloat16"),
        "evo2_7b_262k":          Checkpoint(4096, 4096, 32, "bp", 262_144, "none", "bfloat16"),
        "evo2_7b":               Checkpoint(4096, 4096, 32, "bp", 1_048_576, "none", "bfloat16"),
        "evo2_20b":              Checkpoint(8192, 8192, 24, "bp", 1_048_576, "none", "bfloat16"),
        "evo2_40b_base":         Checkpoint(8192, 8192, 50, "bp", 8_192, "none", "bfloat16"),
        "evo2_40b":              Checkpoint(8192, 8192, 50, "bp", 1_048_576, "none", "bfloat16"),
        SIMULATED:               Checkpoint(64, 64, None, "bp", None, "none", "float32"),
    },
    "generator": {
        "GENERator-eukaryote-1.2b-base":
            Checkpoint(2048, 2048, 26, "6-mer", 98_304, "none", "bfloat16"),
        "GENERator-eukaryote-3b-base":
            Checkpoint(3072, 3072, 30, "6-mer", 98_304, "none", "bfloat16"),
        "GENERator-v2-eukaryote-1.2b-base":
            Checkpoint(2048, 2048, 26, "6-mer", 98_304, "none", "bfloat16"),
        "GENERator-v2-eukaryote-3b-base":
            Checkpoint(3072, 3072, 30, "6-mer", 98_304, "none", "bfloat16"),
        "GENERator-v2-prokaryote-1.2b-base":
            Checkpoint(2048, 2048, 26, "6-mer", 98_304, "none", "bfloat16"),
        "GENERator-v2-prokaryote-3b-base":
            Checkpoint(3072, 3072, 30, "6-mer", 98_304, "none", "bfloat16"),
        SIMULATED:
            Checkpoint(64, 64, None, "6-mer", None, "none", "float32"),
    },
    "caduceus": {
        "caduceus-ph_seqlen-131k_d_model-256_n_layer-16":
            Checkpoint(256, 256, 16, "bp", 131_072, "augmented", "float32"),
        "caduceus-ps_seqlen-131k_d_model-256_n_layer-16":
            Checkpoint(256, 512, 16, "bp", 131_072, "equivariant", "float32"),
        "caduceus-ph_seqlen-1k_d_model-118_n_layer-4_lr-8e-3":
            Checkpoint(118, 118, 4, "bp", 1_024, "augmented", "float32"),
        "caduceus-ps_seqlen-1k_d_model-118_n_layer-4_lr-8e-3":
            Checkpoint(118, 236, 4, "bp", 1_024, "equivariant", "float32"),
        "caduceus-ph_seqlen-1k_d_model-256_n_layer-4_lr-8e-3":
            Checkpoint(256, 256, 4, "bp", 1_024, "augmented", "float32"),
        "caduceus-ps_seqlen-1k_d_model-256_n_layer-4_lr-8e-3":
            Checkpoint(256, 512, 4, "bp", 1_024, "equivariant", "float32"),
        "PlantCaduceus_l24": Checkpoint(512, 1024, 24, "bp", 512, "equivariant", "float32"),
        SIMULATED:           Checkpoint(64, 128, None, "bp", None, "equivariant", "float32"),
    },
    "dnabert2": {
        "DNABERT-2-117M": Checkpoint(768, 768, 12, "BPE", None, "none", "float32"),
        SIMULATED:        Checkpoint(64, 64, None, "BPE", None, "none", "float32"),
    },
    "nucleotide-transformer": {
        "nucleotide-transformer-500m-human-ref":
            Checkpoint(1280, 1280, 24, "6-mer", 6_000, "none", "float32"),
        "nucleotide-transformer-500m-1000g":
            Checkpoint(1280, 1280, 24, "6-mer", 6_000, "none", "float32"),
        "nucleotide-transformer-2.5b-multi-species":
            Checkpoint(2560, 2560, 32, "6-mer", 6_000, "none", "float32"),
        "nucleotide-transformer-2.5b-1000g":
            Checkpoint(2560, 2560, 32, "6-mer", 6_000, "none", "float32"),
        "nucleotide-transformer-v2-100m-multi-species":
            Checkpoint(512, 512, 22, "6-mer", 12_288, "none", "float32"),
        "nucleotide-transformer-v2-500m-multi-species":
            Checkpoint(1024, 1024, 29, "6-mer", 12_288, "none", "float32"),
        SIMULATED:
            Checkpoint(64, 64, None, "6-mer", None, "none", "float32"),
    },
    "hyenadna": {
        "hyenadna-small-32k-seqlen":   Checkpoint(256, 256, 4, "bp", 32_768, "none", "float32"),
        "hyenadna-medium-160k-seqlen": Checkpoint(256, 256, 8, "bp", 160_000, "none", "float32"),
        "hyenadna-large-1m-seqlen":    Checkpoint(256, 256, 8, "bp", 1_000_000, "none", "float32"),
        SIMULATED:                     Checkpoint(64, 64, None, "bp", None, "none", "float32"),
    },
}

ANY = Checkpoint(0, 0, None, "", None, "none", "float32")
"""A table of which nothing is known beforehand: any width, any layer."""
FREE = ("generic", "dosage", "pgs")
"""Families that are not in `REGISTRY`: any name is a checkpoint of theirs."""

LAYER_NAMES: dict[str, tuple[str, ...]] = {
    "evo2":
        ("embedding_layer", "blocks.N", "blocks.N.mlp", "blocks.N.mlp.l3", "blocks.N.pre_norm",
         "blocks.N.post_norm", "norm"),
    "generator":
        ("hidden_states.N", "model.layers.N", "model.norm", "last"),
    "caduceus":
        ("hidden_states.N", "backbone.layers.N", "backbone.norm_f", "last"),
    "dnabert2":
        ("hidden_states.N", "encoder.layers.N", "last"),
    "nucleotide-transformer":
        ("hidden_states.N", "esm.encoder.layers.N", "last"),
    "hyenadna":
        ("hidden_states.N", "backbone.layers.N", "backbone.ln_f", "last"),
}
"""What layers are called, N from 0; a number alone is taken as hidden_states.N."""
# fmt: on

_N_LISTED = 6
_NOT_HIDDEN = re.compile(r"(?:^|\.)(?:mlp\.l[12]|projections)$")
_EVO2_LAYER = re.compile(
    r"(?:embedding_layer|norm|blocks\.(\d+)(?:\.mlp|\.mlp\.l3|\.pre_norm|\.post_norm)?)"
)
_LAYER = re.compile(
    r"(?:last|last_hidden_state|(?:\w+\.)*(?:norm(?:_f)?|ln_f)"
    r"|(?:\w+\.)*(?:layers?|blocks)\.(\d+)|hidden_states\.(\d+)|-?(\d+))"
)


def find_checkpoint(model: str, name: str) -> Checkpoint:
    """The row of `name` ("evo2_7b", "GenerTeam/GENERator-eukaryote-1.2b-base") in a family.

    Raises:
        UserError: The family has no such checkpoint; the nearest is named.
    """
    if model in FREE:
        return ANY
    family = REGISTRY[model]
    short = plain_name(name)
    if short not in family:
        # GENERator's own script has the words of one name in another order.
        words = sorted(short.lower().split("-"))
        swapped = [known for known in family if sorted(known.lower().split("-")) == words]
        hint = f"Did you mean '{swapped[0]}'?" if swapped else nearest(short, family)
        raise UserError(f"checkpoint '{name}' is not one of {model}'s. {hint}")
    return family[short]


def plain_name(name: str) -> str:
    """A checkpoint's name without the hub organisation."""
    return name.rsplit("/", 1)[-1]


def unit_bp(token_unit: str) -> int | None:
    """Base pairs a token, where all tokens have as many."""
    return {"bp": 1, "6-mer": 6}.get(token_unit)


def candidates(width: int) -> list[str]:
    """The checkpoints whose ready or raw vectors have `width` numbers, the latter marked ps_raw."""
    found = []
    for family in REGISTRY.values():
        for name, spec in family.items():
            if name == SIMULATED:
                continue
            if spec.width == width:
                found.append(name)
            elif spec.output_width == width:
                found.append(f"{name} as ps_raw")
    return found


def expected_width(spec: Checkpoint, strands: str) -> int:
    """The width that files of `spec` must have, given how their strands are stored."""
    if strands == "ps_raw":
        return spec.output_width
    return 2 * spec.width if strands == "concat" else spec.width


def check_width(width: int, *, name: str, spec: Checkpoint, strands: str, where: str) -> None:
    """Hold the width that was found against the declared checkpoint.

    Raises:
        UserError: They differ; checkpoints with the width that was found are named.
    """
    expected = expected_width(spec, strands)
    if width == expected:
        return
    found = candidates(width)
    listed = ", ".join(found[:_N_LISTED]) + (" ..." if len(found) > _N_LISTED else "")
    hint = f"Checkpoints of width {width}: {listed}" if found else "No known checkpoint has that"
    if width == 2 * spec.width and strands != "concat":
        hint += f"; or two strands of '{name}' side by side, to be declared under 'strands'"
    raise UserError(
        f"{where}: vectors of width {width}, but '{name}' with strands '{strands}' gives "
        f"{expected}. {hint}. Declare the checkpoint that made the file in provenance.json."
    )


def check_layer(model: str, name: str, spec: Checkpoint, layer: str, *, where: str) -> None:
    """Refuse a layer that does not exist or does not hold the residual stream's width.

    Raises:
        UserError: As above, naming the range of the checkpoint.
    """
    if _NOT_HIDDEN.search(layer):
        raise UserError(
            f"{where}: layer '{layer}' is inside a block and no embedding (its width is not the "
            "hidden size): use 'blocks.N', 'blocks.N.mlp.l3' or 'norm'."
        )
    if spec.n_layers is None:
        return
    match = (_EVO2_LAYER if model == "evo2" else _LAYER).fullmatch(layer)
    if match is None:
        known = ", ".join(f"'{known}'" for known in LAYER_NAMES[model])
        raise UserError(f"{where}: '{name}' has no layer '{layer}'; expected such as {known}.")
    number = next((int(group) for group in match.groups() if group is not None), 0)
    # Hidden states count the input embedding as 0; a bare number may follow either habit.
    last = spec.n_layers - (1 if re.search(r"(layers?|blocks)\.", layer) else 0)
    if number > last:
        raise UserError(
            f"{where}: layer '{layer}' does not exist in '{name}': it has {spec.n_layers} layers "
            f"(the last is {last}). Declare the checkpoint or the layer that made the file."
        )


def check_tokens(
    model: str,
    name: str,
    spec: Checkpoint,
    *,
    token_unit: str | None,
    length_bp: int | None,
    n_tokens: int | None,
    chunked: bool,
    where: str,
) -> None:
    """Hold the declared token unit and input length against the checkpoint's tokenizer.

    Raises:
        UserError: Another unit; a length that a 6-mer tokenizer cannot cut evenly (it appends
            `<oov>` in silence); a length beyond the context; tokens that do not cover the length.
    """
    if token_unit is not None and spec.token_unit and token_unit != spec.token_unit:
        raise UserError(
            f"{where}: token_unit '{token_unit}', but '{name}' reads {spec.token_unit} tokens; "
            "correct provenance.json, or the checkpoint in it."
        )
    if length_bp is None:
        return
    if model == "generator" and length_bp % 6:
        raise UserError(
            f"{where}: length_bp={length_bp} is not a multiple of 6, so {model}'s tokenizer "
            f"appended <oov>: extract again from {length_bp - length_bp % 6} bp (trim before "
            "taking the reverse complement)."
        )
    if spec.context_bp is not None and length_bp > spec.context_bp and not chunked:
        raise UserError(
            f"{where}: length_bp={length_bp} is longer than the {spec.context_bp} bp that '{name}' "
            "reads: extract in chunks and declare n_chunks."
        )
    unit = unit_bp(spec.token_unit)
    if n_tokens is not None and unit is not None:
        n_expected = -(-length_bp // unit)
        if not n_expected <= n_tokens <= n_expected + 2:  # up to two special tokens
            raise UserError(
                f"{where}: {n_tokens} tokens do not cover length_bp={length_bp} "
                f"({n_expected} {spec.token_unit} tokens and up to 2 special ones expected)."
            )
