"""End-to-end SAE: trained for what the language model makes of its reconstruction (Braun et al. 2024,
https://arxiv.org/abs/2405.12241).

f    = relu(x W_enc + b_enc)
loss = KL(p_clean || p_spliced) + later sum_l |a_l - a_l'|^2 / var(a_l) / n_layers + c sum_i f_i,  |d_i| = 1

Whole sequences go through the model with x_hat in place of the stream; a_l' are the later residual streams then. The
last but one term, with weight `later`, is the paper's "downstream" variant; without it the weight is 0.
"""

from dataclasses import dataclass
from typing import Annotated, ClassVar, final

from annotated_types import Ge
from torch import Tensor

from saebench.saes._dictionary import Dictionary
from saebench.saes.relu import ReLU as ReLUSAE
from saebench.variants._training import (
    DictionaryTraining,
    Lesson,
    Penalised,
    PenaltyControl,
    Task,
    Training,
)


@final
@dataclass(frozen=True, kw_only=True)
class EndToEnd(Penalised):
    target: ClassVar = "same"
    end_to_end: ClassVar[bool] = True

    later: Annotated[float, Ge(0)]
    """Weight of the error of later layers."""

    def start(self, task: Task) -> Training:
        return _Training(self, task)


@final
class _Training(DictionaryTraining):
    def __init__(self, recipe: EndToEnd, task: Task) -> None:
        super().__init__(task)
        self.recipe = recipe
        self.control = PenaltyControl(task, recipe)

    def loss(self, lesson: Lesson) -> Tensor:
        assert lesson.downstream is not None, "the trainer gives the model to variants that ask"
        chosen, f = self.rectified(lesson.x)
        x_hat = self.predict(chosen, f, lesson.x)
        found = lesson.downstream(x_hat, self.recipe.later > 0)
        self.control.update(chosen.l0(f), len(lesson.x), lesson.progress)
        penalty = self.control.coefficient() * f.sum() / len(lesson.x)
        later = 0.0 if found.later is None else self.recipe.later * found.later
        return found.kl + later + penalty

    def export(self) -> Dictionary:
        return self.filled(ReLUSAE, {"b_enc": self.b_enc})
