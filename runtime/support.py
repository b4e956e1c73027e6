"""Which models the executor can run so far; profiles and searches cover more."""

from __future__ import annotations

from ..search_spaces.schema import ModelSpec


def check_runs(model: ModelSpec) -> None:
    """Refuse a model that can be profiled and searched, but not executed.

    Raises:
        ValueError: it has experts.
    """
    if model.num_local_experts is not None:
        raise ValueError(
            f"only models without experts can be executed so far, but {model.name} has "
            f"{model.num_local_experts} a layer, and the runtime has neither weights nor buffers "
            "for the router, the grouped GEMMs and the combine: measure its kernels with "
            "`nanoflow-tune profile`, predict a plan from a profile with `nanoflow-tune search` "
            "where there is no GPU, or choose a dense --model"
        )
