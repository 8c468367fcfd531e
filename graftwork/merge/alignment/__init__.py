"""Alignment of models: units of one re-ordered so that they match those of another, without changing what it computes.

| module | what it does |
|---|---|
| `spec` | what may be re-ordered, and its JSON |
| `families` | specs by the names of tensors |
| `derive`, `operations`, `factors` | specs by tracing a module |
| `apply` | what an order does to tensors; permutations and their files |
| `matching`, `activations`, `straight_through`, `many` | find an order, for two models or more |
| `assignment`, `scores` | solve one group |
| `match` | all of it from checkpoint to checkpoint |
| `barrier`, `renormalize`, `analysis` | judge what an alignment has brought |
"""
