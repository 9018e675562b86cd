"""For EleutherAI's sparsify (https://github.com/EleutherAI/sparsify): `cfg.json` and `sae.safetensors`.

TopK and GroupMax, as SAEs or as transcoders. Weights are written as they are, but for b_enc of an SAE: the package
subtracts b_dec from x before it encodes, so that b_enc + b_dec W_enc is written. The site is not written: in this
format it is the name of the folder.
"""

import json
from pathlib import Path
from typing import final

from safetensors.torch import save_file

from saebench.errors import UserError
from saebench.exports._export import Export, Origin
from saebench.saes._dictionary import Dictionary
from saebench.saes.groupmax import GroupMax
from saebench.saes.topk import TopK


@final
class Sparsify(Export):
    def write(self, sae: Dictionary, origin: Origin, folder: Path) -> None:
        if not isinstance(sae, TopK | GroupMax):
            raise UserError(
                f"sparsify has TopK and GroupMax, with k latents for every token; this is {type(sae).__name__}"
            )
        if sae.d_in != sae.d_out:
            raise UserError(
                "sparsify has one width for what is read and what is predicted; here they are "
                f"{sae.d_in} and {sae.d_out}"
            )
        transcodes = origin.site != origin.target
        b_enc = sae.b_enc if transcodes else sae.b_enc + sae.b_dec @ sae.W_enc
        weights = {
            "encoder.weight": sae.W_enc.T,
            "encoder.bias": b_enc,
            "W_dec": sae.W_dec,
            "b_dec": sae.b_dec,
        }
        if sae.W_skip is not None:
            weights["W_skip"] = sae.W_skip.T
        save_file(
            {name: w.detach().float().cpu().contiguous() for name, w in weights.items()},
            folder / "sae.safetensors",
        )
        config = {
            "activation": "topk" if isinstance(sae, TopK) else "groupmax",
            "expansion_factor": max(1, sae.d_sae // sae.d_in),
            "normalize_decoder": False,  # or it would be, if they train it further
            "num_latents": sae.d_sae,
            "k": sae.k,
            "multi_topk": False,
            "skip_connection": sae.W_skip is not None,
            "transcode": transcodes,
            "d_in": sae.d_in,
        }
        (folder / "cfg.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
