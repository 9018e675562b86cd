"""Clusters of the training stream: a token is given back as the centre that is nearest to it.

Lloyd's k-means in mini-batches (Sculley 2010, https://doi.org/10.1145/1772690.1772862), with as many centres as the
trained SAEs have latents, and exactly one active latent per token whatever L0 the suite asks for: what a dictionary
of this width is worth when nothing can be combined.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, final

import torch
from sklearn.cluster import MiniBatchKMeans

from saebench.controls._control import Asked, BuiltControl, Material, Planned
from saebench.progress import say
from saebench.saes._dictionary import Dictionary
from saebench.saes.codebook import Codebook

_TOKENS_PER_STEP = 4096

_SPREAD_UP_TO = 4096
"""Centres that start spread out (k-means++), which takes long for many: more of them start at random tokens."""


@final
@dataclass(frozen=True)
class KMeans(BuiltControl):
    seed: int = 0

    kind: ClassVar = "reference"

    def plan(self, asked: Sequence[Asked]) -> list[Planned]:
        return [
            Planned(f"-w{width}", width, None) for width in dict.fromkeys(a.width for a in asked)
        ]

    def build(self, planned: Planned, material: Material) -> Dictionary:
        assert planned.width is not None, "planned from a trained SAE"
        x = material.x
        width = min(planned.width, len(x))
        if width < planned.width:
            say(
                f"the control kmeans has {width:,} centres instead of {planned.width:,}: "
                "it is fitted to that many tokens, and each can be a centre of its own at the most"
            )
        # Centred, so that a large mean takes no digits from the distances.
        mean = x.double().mean(0)
        kmeans = MiniBatchKMeans(
            width,
            batch_size=max(_TOKENS_PER_STEP, width),
            init="k-means++" if width <= _SPREAD_UP_TO else "random",
            n_init=1,
            random_state=self.seed,
        )
        kmeans.fit((x.double() - mean).float().cpu().numpy())
        sae = Codebook(x.shape[1], width)
        sae.W_dec.copy_(torch.from_numpy(kmeans.cluster_centers_))
        sae.b_dec.copy_(mean)
        sae.size.fill_(1)
        return sae
