"""The wire contract of the storage daemon: expert_store.proto, and the modules that ``make proto`` generates from it."""
