"""The storage daemon's wire contract: expert_store.proto, and the modules that ``make proto`` generates from it."""
