"""Which requests an engine could never run, whatever else runs."""

from __future__ import annotations

from .page_pool import PagePool
from .scheduler_records import SchedulerLimits
from .sequence import GenerationRequest, RequestRejected


def check_request(request: GenerationRequest, limits: SchedulerLimits, pool: PagePool) -> None:
    """Refuse a request that is empty or too long.

    Raises:
        RequestRejected: 400 or 413, with rule, value and remedy.
    """
    prompt, limit = len(request.prompt_token_ids), limits.max_model_len
    total = prompt + request.sampling.max_tokens
    if not prompt:
        raise RequestRejected(400, "the prompt must have at least one token, but got none")
    if total > limit:
        raise RequestRejected(
            413,
            f"prompt and `max_tokens` together may have {limit} tokens, but got {prompt} + "
            f"{request.sampling.max_tokens}: shorten one of them",
        )
    if pool.pages_for(total) > pool.num_pages:
        room = pool.num_pages * pool.page_size
        raise RequestRejected(
            413,
            f"the KV cache holds {room} tokens, but the request may reach {total}: lower "
            "`max_tokens`, or give the cache more memory",
        )
