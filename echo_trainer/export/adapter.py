"""`export_adapter`: an adapter in another form, by the name of the form."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from ..adapter.folder import AdapterError
from ..adapter.logit_error import LogitError
from .forms import export_lora, export_merged, export_portable
from .gguf import export_gguf

FORMS = ("portable", "merged", "lora", "gguf")


def export_adapter(
    adapter: str | Path, out: str | Path, form: str = "portable", base: Any = None, **options: Any
) -> LogitError | Path:
    """
    Write an adapter in the form that a server wants; the adapter itself is left as it is.

    ```python
    export_adapter("runs/my-adapter", "merged-model", "merged", dtype="bfloat16")
    ```

    Args:
        adapter: a PEFT adapter folder.
        out: the folder to write ("gguf": the file), which must not be there yet.
        form: "portable" (the same function in the form that all engines read), "merged" (base and adapter as one
            model), "lora" (a LoRA fitted to a DoRA; loses something) or "gguf" (for llama.cpp).
        base: folder or Hub id of the base; None takes the name in the adapter's config.
        options: of the form: `rank` (portable, lora), `dtype` (merged: bfloat16, float16 or float32), `outtype` and
            `converter` (gguf).

    Returns:
        How far the logits are from those of base + adapter in PEFT ("merged", "lora"), or what was written.

    Raises:
        AdapterError: an unknown form or option, the adapter is broken or does not fit its base, or `out` is there.
    """
    makers = {"portable": export_portable, "merged": export_merged, "lora": export_lora, "gguf": export_gguf}
    if form not in makers:
        raise AdapterError(f"form={form!r} is unknown. Choose one of: {', '.join(FORMS)}.")
    known = list(inspect.signature(makers[form]).parameters)[3:]  # after adapter, out and base
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise AdapterError(f"The form {form!r} knows no option {', '.join(unknown)}; it has {', '.join(known)}.")
    return makers[form](adapter, out, base, **options)
