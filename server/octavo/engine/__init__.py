"""The process that owns the model: loop, runner, sampler, weights."""
