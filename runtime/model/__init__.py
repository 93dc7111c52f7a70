"""Loading a model over the tiers: ``moetier.load``, and ``register`` for transformers' ``from_pretrained``.

    load            ``moetier.load``
    load_errors     errors and reports of transformers while it loads
    register        transformers' ``from_pretrained``
    quantizer       what transformers calls while it loads
    attach          attaches the tiers to the loaded model
    tiers           ``model.tiers``
    sources         the host tier: this process's own, or a daemon's
    budgets         memory besides experts, and the budgets for experts
    kv_budget       memory for keys, values and other states of sequences, and the context
    same_bits       whether a token has the same bits in every company
    prefill_memory  memory that a prompt takes
    context         the longest context
    names           names and addresses of models
    name_files      names of converted and linked models, and last uses
    trunk_files     files of the trunk, mapped or copied
    vocabulary      the check of its tokenizer

Other packages use ``load``, ``register``, ``prefill_memory`` and ``tiers``. The package imports ``checkpoint``,
``client``, ``kernels``, ``moe`` and ``speculation`` of ``runtime``, and ``tiers``.
"""

from typing import TYPE_CHECKING

from moetier.tiers.exports import exports

if TYPE_CHECKING:
    from .tiers import Tiers as Tiers

__getattr__ = exports(__name__, {"Tiers": "tiers"})
