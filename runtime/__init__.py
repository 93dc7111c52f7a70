"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

``options`` has the declaration of an option; ``config`` declares those of loading once, for ``load``, the command
line, settings files and the daemon. ``device_names`` has a line for each device that can compute.

All threads that moetier starts, by their names, which for several threads end in a number:

    any process with a tier
        moetier-loader      reads records into slots (``tiers.host.tier``)
        moetier-timekeeper  ends requests of other processes whose time is over (``tiers.host.session``)
        moetier-learner     loads the most used experts, and saves which they are (``tiers.host.warmup``)
        moetier-promoter    copies predicted records to a GPU (``tiers.device.promoter``)
        moetier-arena       allocates the pages of the slots (``tiers.arena.arena``)
        moetier-recovery    checks the records of a reclaimed arena (``tiers.arena.arena``)
        moetier-closer      closes the tiers of a model that was garbage-collected (``model.tiers``)
    stores
        moetier-store       reads parts of large or mirrored records (``tiers.store.reader``, ``tiers.extents.reader``)
        moetier-digest      compares an older store with its digest (``tiers.store.reader``)
        moetier-cache       writes fetched records into the cache (``tiers.objects.cache``)
        moetier-fetch       fetches what a cache needs before it is opened (``tiers.objects.cache_folder``)
        moetier-verify      compares all records with their checksums (``tiers.store.scrub``)
    computing
        moetier-kernels     computes (``kernels.jit.team``)
        moetier-ahead       compiles what a command will need (``kernels.ahead``)
    clients
        moetier-link        takes the answers of the daemon on this host (``client.daemon_link``)
        moetier-remote      fetches parts of a record from another host (``client.remote``)
        moetier-check       checks daemons of other hosts at the start (``client.peers``)
        moetier-peers       checks them again, and resolves their names (``client.peers``)
    daemon
        moetier-grpc        serves calls (``daemon.server``)
        moetier-session     takes the messages of a client on this host (``daemon.rpc``)
        moetier-control     accepts clients of this host (``daemon.control_server``)
        moetier-greeter     greets a client, and waits for its end (``daemon.control_server``)
        moetier-fetches     cancels fetches whose clients take nothing (``daemon.fetch``)
        moetier-opener      imports the compiler (``daemon.hosted_model``)
        moetier-compiler    compiles code for the calls of other hosts (``daemon.compute``)
        moetier-trunk       checks the trunk's files (``daemon.hosted_model``)
        moetier-metrics     answers requests for metrics (``daemon.metrics``)
    commands
        moetier-engine      computes the steps of all sequences (``engine.engine``)
        moetier-watch       queries a daemon (``tools.top.watch``)
        moetier-convert     encodes records (``tools.convert.encoder``)
        moetier-download    downloads the next file of a checkpoint (``tools.convert.streaming``)
        moetier-headers     reads headers of files at the hub (``checkpoint.hub``)
        moetier-samples     compares samples of weights (``checkpoint.extents``)
        moetier-plan        measures an object store (``tools.plan.cold``)
        moetier-reads       measures the disk (``tools.rates.reads``)
        moetier-daemon      runs a daemon beside Ray (``tools.ray.daemon_actor``)
        moetier-daemon-log  copies its log (``tools.ray.daemon_actor``)
        moetier-hold        keeps it alive (``tools.ray.daemon_actor``)
"""
