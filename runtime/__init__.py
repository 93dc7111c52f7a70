"""Models and processes: loading and running a model over the tiers, and the daemon that shares one copy per machine.

``config`` declares the options of loading once, for ``load``, the command line, settings files and the daemon.
``device_names`` has a line for each device that can compute.

All threads that moetier starts, by their names, which for several threads end in a number. gRPC, obstore and Ray have
threads of their own, and a server has those of asyncio (``tools.serve.waiting``) and Starlette (``tools.serve.app``).

    any process with a tier
        moetier-loader      reads records into slots (``tiers.host.loaders``)
        moetier-timekeeper  ends requests of other processes whose time is over (``tiers.host.session``)
        moetier-learner     loads the most used experts, and saves which they are (``tiers.host.warmup``)
        moetier-promoter    copies predicted records to a GPU (``tiers.device.promoter``)
        moetier-arena       allocates the pages of the slots (``tiers.arena.arena``)
        moetier-recovery    checks the records of a reclaimed arena (``tiers.arena.arena``)
        moetier-closer      closes the tiers of a model that was garbage-collected (``model.tiers``)
    stores
        moetier-store       reads parts of large or mirrored records (``tiers.store.reader``, ``tiers.extents.reader``)
        moetier-digest      compares an older store with its digest (``tiers.store.reader``)
        moetier-cache       writes fetched records into the cache (``tiers.objects.cache_writer``)
        moetier-fetch       fetches what a cache needs before it is opened (``tiers.objects.cache_folder``)
        moetier-verify      compares all records with their checksums (``tiers.store.scrub``)
    computing
        moetier-kernels     computes (``kernels.jit.team``)
        moetier-ahead       compiles what a command will need (``kernels.ahead``)
    clients
        moetier-link        takes the answers of the daemon on this machine (``client.daemon_link``)
        moetier-remote      fetches parts of a record from another host (``client.remote``)
        moetier-check       checks daemons of other hosts at the start (``client.peers``)
        moetier-peers       checks them again, and resolves their names (``client.peers``)
    daemon
        moetier-grpc        serves calls (``daemon.server``)
        moetier-session     takes the messages of a client on this machine (``daemon.rpc``)
        moetier-control     accepts clients of this host (``daemon.control_server``)
        moetier-greeter     greets a client, and waits for its end (``daemon.control_server``)
        moetier-fetches     cancels fetches whose clients take nothing (``daemon.fetch``)
        moetier-opener      imports the compiler (``daemon.hosted_model``)
        moetier-compiler    compiles code for the calls of other hosts (``daemon.compute``)
        moetier-trunk       checks the trunk's files (``daemon.hosted_model``)
        moetier-metrics     answers requests for metrics (``daemon.metrics``)
    commands
        moetier-engine      computes the steps of all sequences (``engine.engine``)
        moetier-pages       reads pages of keys and values from the disk (``engine.pages.page_reader``)
        moetier-page-writer writes them (``engine.pages.page_writer``)
        moetier-masks       makes the masks of grammars (``engine.engine``)
        moetier-models      loads and unloads the models of a server (``tools.serve.models``)
        moetier-grammar     compiles a grammar (``engine.grammar``)
        moetier-ask         asks another server (``tools.launch.server``)
        moetier-watch       queries a daemon (``tools.top.watch``)
        moetier-convert     encodes records (``tools.convert.encoder``)
        moetier-download    downloads the next file of a checkpoint (``tools.convert.streaming``)
        moetier-headers     reads headers of files at the hub (``checkpoint.hub``)
        moetier-samples     compares samples of weights (``checkpoint.extents``)
        moetier-plan        measures an object store (``tools.plan.cold``)
        moetier-reads       measures the disk (``tools.rates.reads``)
        moetier-daemon      runs a daemon beside Ray (``tools.ray.supervisor``)
        moetier-daemon-log  copies its log (``tools.ray.supervisor``)
        moetier-hold        keeps it alive (``tools.ray.daemon_actor``)

All locks, and what each guards. The comment at a lock names the fields. ``tiers.locks`` has the order in which locks
are taken, and the rule for the fields. Two more belong to libraries: tqdm's lock of its bars (``tools.cli.progress``),
and the number of Watch calls (``daemon.server``).

    tiers and stores
        Monitor._lock           all state of a host tier or device tier (``tiers.locks``)
        UseCount._lock          the number of uses in progress, which ``close`` waits for (``tiers.locks``)
        SlotViews._lock         the cache of tensors on the host's slots (``tiers.device.views``)
        MirroredStore._lock     failures and speed of each copy (``tiers.store.mirror``)
        _Piece._lock            the read of one piece, which one thread makes (``tiers.store.pieces``)
        CachedStore._lock       the opening of the client of an object store, and counts (``tiers.objects.cache``)
        CacheWriter._keeping    fetched records that are yet to be written (``tiers.objects.cache_writer``)
        Inbox._arrived          nothing: it wakes the thread that waits for items (``tiers.inbox``)
        Objects._lock           counts of requests, and when failures are logged (``tiers.objects.client``)
        checkpoint_store._lock  the table of a checkpoint, which one thread makes (``stores.checkpoint_store``)
    computing
        emitter.compile_lock    LLVM (``kernels.jit.emitter``)
        team._making            the making of the team of threads (``kernels.jit.team``)
        Team._starting          the starting of its threads (``kernels.jit.team``)
    loading
        ModelBuilding._changed  what builds a model, and what computes (``libraries.model_building``)
        quantizer._lock         transformers' registries (``model.quantizer``)
        register._lock          the replacement of ``from_pretrained`` (``model.register``)
    clients
        ClientUses._counting    the client's counters (``client.uses``)
        ClientDiskOrder._changed      misses that wait, and pages that are read (``client.disk_order``)
        Link._lock              requests that are sent, for the first time or again (``client.daemon_link``)
        Fallback._lock          the opening of the local store (``client.fallback``)
        Peers._state            the daemons, and which are away (``client.peers``)
        RemoteStore._state      the connections to one daemon (``client.remote``)
        _Transfer._state        the calls that fetch one record (``client.remote``)
        RemoteCompute._lock     the outputs that are waited for (``client.remote_compute``)
        FetchRate._lock         bytes and seconds of fetches (``client.costs``)
        SpreadStore._counting   counts of the local store (``client.spread``)
    daemon
        Clients._changed        the registered clients and their calls (``daemon.clients``)
        SessionCall._state      whether a stream has ended (``daemon.clients``)
        ControlServer._state    the control connections (``daemon.control_server``)
        HostedModel._opening    the start of the thread that imports the compiler (``daemon.hosted_model``)
        ClientCounts._lock      counts of a model's clients (``daemon.client_counts``)
        OpenCalls._lock         the calls of other hosts that are under way (``daemon.leases``)
        FetchCalls._state       the records that fetches lease (``daemon.fetch``)
        ComputeCalls._state     code that is or will be compiled (``daemon.compute``)
        compute._computing      the team of threads, which computes one call at a time (``daemon.compute``)
        RateLimitedLog._lock    when the next line may be logged (``daemon.log``)
        _Server._state          the connections for metrics (``daemon.metrics``)
    commands
        Merging._merging        the merging of parameters, by one thread at a time (``checkpoint.recipe``)
        Engine._changed         the engine's sequences (``engine.engine``)
        PageWriter._changed     sequences to be written (``engine.pages.page_writer``)
        PageFolder._counting    the number of damaged files (``engine.pages.page_folder``)
        GrammarCompiler._making the making of llguidance's tokenizer (``engine.grammar``)
        grammar._stack_size     the size of the stacks of new threads (``engine.grammar``)
        Answer._lock            the end of an answer (``tools.serve.answers``)
        Models._changed         which models are loaded and wanted (``tools.serve.models``)
        SampledTokens._lock     sampled tokens of answers (``tools.serve.sampled_tokens``)
        Tally._lock             counts of answers (``tools.serve.metrics``)
        RateLimits._lock        what each key has used (``tools.serve.keys``)
        EarlyDifference._lock   the latest prompt of each client (``tools.serve.early_difference``)
        UnknownFields._lock     names of fields that were logged (``tools.serve.protocols.body``)
        Watch._changed          what the user has set (``tools.top.watch``)
"""
