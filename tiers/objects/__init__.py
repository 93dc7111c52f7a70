"""Models in an object store: a store whose records are fetched by key and kept in a cache of the same layout.

Other packages use ``cache_folder``, which makes the cache's folder of an address, ``cache.CachedStore``, which reads
records through it, and ``push``. The package imports ``tiers.store`` and the top-level modules of ``tiers``. Only
``client`` and ``aws_profile`` import obstore, which the extra ``objects`` installs.
"""
