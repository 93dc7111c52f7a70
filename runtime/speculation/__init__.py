"""Speculative gating: predict the experts of the next blocks and prefetch them.

Other packages use ``speculation.Speculation``. It follows Eliseev & Mazur 2023 (arXiv 2312.17238), section 3.2. The
package imports ``runtime.moe`` and ``tiers``.
"""
