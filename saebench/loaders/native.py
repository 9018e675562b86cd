"""The format of this project: a folder with `sae.safetensors` and `sae.json`.

`sae.json` names the architecture (a module of `saes/`) with its arguments, the site that it reads and the one that
it predicts (the same, but for transcoders), the SHA-256 of the weights file, and how the SAE was trained: on which
revision of which model, among others. The weights take raw activations.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, final

from saebench.loaders._files import Source
from saebench.loaders._loader import Loader, Member, Told, needless, the_site
from saebench.loaders._native import native_record, native_sae, site_of


@final
class Native(Loader):
    def fits(self, source: Source) -> bool:
        return source.has("sae.json", "sae.safetensors")

    def members(self, source: Source, told: Told) -> Sequence[Member]:
        where = str(source.path)
        needless(told, where, "k", "norm")
        record = native_record(source)
        site = the_site(told.site, site_of(record, "site", source), where)
        target = the_site(told.predicts, site_of(record, "target", source), where, "predicts")
        model = _model(record)
        return [Member(site, target, model, partial(native_sae, source, record))]


def _model(record: Mapping[str, Any]) -> str | None:
    """As the trainer writes it, for people to read."""
    found: Any = record
    for name in ("training", "model", "id"):
        found = found.get(name) if isinstance(found, dict) else None
    return found if isinstance(found, str) else None
