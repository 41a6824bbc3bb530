"""The settings of an alignment."""

from dataclasses import dataclass
from typing import Literal

from brainfusion.alignment.genes.conditioning import DnaPool
from brainfusion.alignment.losses.info_nce import LossName
from brainfusion.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True, slots=True)
class AlignConfig:
    """Settings of an alignment; the defaults suit some hundred to some thousand people."""

    # -- features ----------------------------------------------------------------------------
    n_components: int = 512
    """Principal components of each modality, at most half the training people; 0 for none."""
    whiten: bool = True
    """Scale the components to about unit variance."""
    shrinkage: float = 1.0
    """How much components of small variance are held back in whitening; 0 is none."""
    residualise: tuple[str, ...] = ()
    """Columns of the subjects table to regress out of both modalities (age, sex, site, ...)."""

    # -- genes -------------------------------------------------------------------------------
    dna_pool: DnaPool = "concat"
    """All genes side by side and one PCA (concat), or genes pooled by mean, max or attention."""
    gene_components: int = 8
    """Principal components of each gene where genes are pooled; 0 keeps all its columns."""
    gene_width: int = 128
    """Width of a pooled gene's token."""
    attention_lr: float = 0.1
    """Peak learning rate of what says which gene to look at."""

    # -- projectors --------------------------------------------------------------------------
    dim_hidden: int = 1024
    """Width of the hidden layer."""
    dim_out: int = 512
    """Width of the shared space."""
    dropout: float = 0.5
    """Share of hidden units dropped in training."""

    # -- start and score ---------------------------------------------------------------------
    init: Literal["rcca", "random"] = "rcca"
    """Where projectors start: at ridge CCA of the training people, or at random."""
    score: Literal["density-ratio", "cosine"] = "density-ratio"
    """How pairs are scored: by the log density ratio of the shared space, with ridge,
    correlations and scale from validation people, or by the cosine alone."""

    # -- objective ---------------------------------------------------------------------------
    loss: LossName = "info_nce"
    """Ours, or open_clip's ClipLoss (clip) or SigLipLoss (siglip)."""
    init_scale: float = 1.0
    """Logit scale to start from; CLIP starts from 14.3, where some hundred people overfit."""
    min_scale: float = 1.0
    """Least logit scale."""
    max_scale: float = 100.0
    """Greatest logit scale."""
    init_bias: float = -10.0
    """Logit bias to start from; for siglip only."""
    pair_weights: tuple[str, ...] = ()
    """Weights of pairs of modalities, as "brain_brainlm-dna_evo2=0.5" (0 leaves the pair out);
    every pair that is not named has the weight 1. The loss is the weighted mean of the pairs'."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the products in the loss; sums are in float32 always."""
    exchange: Literal["gather", "ring"] = "gather"
    """How processes share embeddings: all at once, or passed around, where memory is short."""

    # -- optimisation ------------------------------------------------------------------------
    lr: float = 0.0
    """Peak learning rate of AdamW; 0: 3e-4 from the closed-form start, 1e-3 from a random one."""
    weight_decay: float = 1.0
    """Weight decay of the matrices; biases, norms and the logit scale have none."""
    max_steps: int = 100
    """Steps at most."""
    warmup_steps: int = 10
    """Steps in which the learning rate rises to its peak."""
    eval_every: int = 5
    """Steps between looks at the validation people."""
    patience: int = 6
    """Looks without a better validation metric after which training stops."""
    early_stopping: Literal["auc", "information"] = "information"
    """The validation metric: AUC, or the bound on mutual information, log N less the loss.
    Both are means over the pairs of modalities of different sides."""
    average_decay: float = 0.95
    """Decay a step of a moving average of the weights, from the start on, or 0 for none:
    each look holds it against the weights, and the better one may be kept.
    On nonlinear simulated cohorts of 2,000 people test information rose by 0.01 to 0.13 nats."""
    batch_size: int = 0
    """People in a batch, over all processes; 0 is all training people at once."""
    seed: int = 0
    """Of weights, batches and dropout."""

    # -- several trainings from the same start ---------------------------------------------
    choose_weight_decay: tuple[float, ...] = ()
    """Weight decays to choose from by the validation metric, in place of the one weight decay:
    every combination with the dropouts to choose from is trained.
    On simulated cohorts a choice of decays or dropouts made no difference to retrieval."""
    choose_dropout: tuple[float, ...] = ()
    """Dropouts to choose from by the validation metric, in place of the one dropout."""
    n_seeds: int = 1
    """Trainings with seeds from the seed on, from the closed-form start only:
    the mean of their best weights is kept where it is better on validation people than the best.
    On simulated cohorts three seeds gained 0.01 nats on validation people and no recall."""

    def __post_init__(self) -> None:
        positive = ("dim_hidden", "dim_out", "max_steps", "eval_every", "patience")
        positive = (*positive, "gene_width", "attention_lr", "n_seeds")
        for name in positive:
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: expected more than 0.")
        for name in (
            *("n_components", "warmup_steps", "weight_decay", "shrinkage", "batch_size", "lr"),
            "gene_components",
        ):
            if getattr(self, name) < 0:
                raise UserError(f"{name}={getattr(self, name)}: expected 0 or more.")
        if self.batch_size == 1:
            raise UserError("batch_size=1: one pair has nothing to be told from; use 2 or more.")
        for name in ("dropout", "average_decay"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(
                    f"{name}={getattr(self, name)}: expected at least 0 and less than 1."
                )
        self._check_members()
        if not 0 < self.min_scale <= self.init_scale <= self.max_scale:
            raise UserError(
                f"min_scale={self.min_scale}, init_scale={self.init_scale}, max_scale="
                f"{self.max_scale}: expected them positive and in this order."
            )

    def _check_members(self) -> None:
        """Refuse candidates that are none, and seeds whose weights have no common start."""
        if any(value < 0 for value in self.choose_weight_decay):
            raise UserError(
                f"choose_weight_decay={self.choose_weight_decay}: expected numbers of 0 or more."
            )
        if any(not 0 <= value < 1 for value in self.choose_dropout):
            raise UserError(
                f"choose_dropout={self.choose_dropout}: expected numbers of at least 0 and less "
                "than 1."
            )
        for name in ("choose_weight_decay", "choose_dropout"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise UserError(f"{name}={getattr(self, name)}: expected each number once.")
        if self.n_seeds > 1 and self.init == "random":
            raise UserError(
                f"n_seeds={self.n_seeds} with init='random': an average of weights that were "
                "trained from random ones is none of them; use init='rcca', or n_seeds=1."
            )
