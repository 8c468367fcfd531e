"""Alignment of models: units of one re-ordered so that they match those of another, without changing what it computes.

`spec` says what may be re-ordered, `apply` does it, `families` and `derive` make specs, the matchers find the order.
"""
