"""Devices that compute models: a class for each, by the names in ``runtime.device_names``.

Other packages use ``device``: the contract ``ComputeDevice``, and the functions that find a device. Measurements of the
processor use ``cpu``; no other module imports one of the classes. The package imports ``kernels`` and ``machine`` of
``runtime``, and ``tiers.device``.
"""
