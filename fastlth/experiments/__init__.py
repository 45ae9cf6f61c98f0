"""Experiments on finished searches. Each uses the one trainer; none has a training loop of its own."""
