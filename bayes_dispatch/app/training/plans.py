"""Plans of ``bayes-dispatch train``: all that decides what a bundle becomes."""

from dataclasses import dataclass, field, replace

from bayes_dispatch.arguments import set_whole
from bayes_dispatch.dispatcher.fitting.svi import SVISettings
from bayes_dispatch.dispatcher.gate import FEWEST_PROMPTS
from bayes_dispatch.experts.training import ExpertSettings
from bayes_dispatch.inference.scoring.evaluation import PROMPT_BYTES, TOTAL_BYTES
from bayes_dispatch.model.mambaformer.config import MambaFormerConfig
from bayes_dispatch.model.pretraining.recipe import Precision, PretrainingSettings

__all__ = ["PLANS", "TrainingPlan"]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Everything that decides the result of a training run.

    Attributes:
        seed: of everything random. curriculum: of ``CURRICULA``.
        backbone: the model. vocabulary: of its subwords; ``None`` for bytes.
        precision: of products in pre-training, and of the weights that it ends with, which experts see in float32.
        pretraining, experts: recipes. svi: settings of the dispatcher's fit.
        pure_prompts: labelled prompts per domain for the dispatcher. mixed_prompts: prompts of known mixture for it.
        gate_pure_prompts: held-out prompts per domain that calibrate the gate. gate_mixed_prompts: of several domains;
            enough of them for a gate, however many domains there are.
        prompt_lengths, gate_lengths: shortest and longest of the dispatcher's and of the gate's, in bytes.
        judged_prompts: held-out prompts per domain, of each of ``judged_lengths`` bytes, that judge it.
        judged_mixtures: of known mixture.
        judged_documents: documents per set that judge experts and blends, 2 at least: differences have errors;
            ``document_bytes``: of a prompt, and in all.

    Raises:
        ConfigError: a number that is not whole, or too small for a stage that comes hours later.
    """

    seed: int = 0
    curriculum: str = "conventions"
    backbone: MambaFormerConfig = field(default_factory=MambaFormerConfig)
    vocabulary: int | None = None
    precision: Precision = "float32"
    pretraining: PretrainingSettings
    experts: ExpertSettings = field(default_factory=ExpertSettings)
    svi: SVISettings = field(default_factory=SVISettings)
    pure_prompts: int = 500
    mixed_prompts: int = 3000
    gate_pure_prompts: int = 120
    gate_mixed_prompts: int = 3200
    gate_lengths: tuple[int, int] = (16, 1024)
    prompt_lengths: tuple[int, int] = (16, 1024)
    judged_prompts: int = 100
    judged_lengths: tuple[int, ...] = (32, 64, 128)
    judged_mixtures: int = 2000
    judged_documents: int = 64
    document_bytes: tuple[int, int] = (PROMPT_BYTES, TOTAL_BYTES)

    def __post_init__(self) -> None:
        set_whole(self, pure_prompts=1, mixed_prompts=1, judged_prompts=1, judged_mixtures=1, judged_documents=2)
        set_whole(self, gate_pure_prompts=1, gate_mixed_prompts=FEWEST_PROMPTS)

    def with_seed(self, seed: int) -> "TrainingPlan":
        """The same plan under another seed."""
        pretraining, experts = replace(self.pretraining, seed=seed), replace(self.experts, seed=seed)
        return replace(self, seed=seed, pretraining=pretraining, experts=experts)


PLANS = {
    "full": TrainingPlan(pretraining=PretrainingSettings(steps=1900)),
    "smoke": TrainingPlan(
        backbone=MambaFormerConfig.tiny(),
        pretraining=PretrainingSettings(steps=20, batch_size=4, length=64, checkpoint_every=10),
        experts=ExpertSettings(steps=5, batch_size=2, length=64),
        svi=SVISettings(steps=30, conditional_steps=10),
        pure_prompts=12,
        mixed_prompts=40,
        gate_pure_prompts=20,
        gate_mixed_prompts=160,
        gate_lengths=(16, 48),
        prompt_lengths=(16, 48),
        judged_prompts=4,
        judged_mixtures=40,
        judged_documents=4,
    ),
}
PLANS["translations"] = replace(
    PLANS["full"],
    curriculum="translations",
    backbone=MambaFormerConfig(d_model=256, head_dim=64),
    vocabulary=6144,
    precision="bfloat16",
    pretraining=PretrainingSettings(steps=800, batch_size=16, length=768, warmup=100),
    experts=ExpertSettings(steps=120, length=768, learning_rate=0.1),
    prompt_lengths=(32, 768),
    gate_lengths=(32, 1024),
    judged_lengths=(64, 128, 256, 512),
    document_bytes=(256, 768),
)
PLANS["translations-smoke"] = replace(
    PLANS["smoke"], curriculum="translations", vocabulary=300, precision="bfloat16", document_bytes=(64, 128)
)
