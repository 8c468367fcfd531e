"""The merge methods: one file per method, or per family that shares a formula."""

from graftwork.merge.methods.registry import Kind, Method, Parameter, get, names, parameter_names

__all__ = ["Kind", "Method", "Parameter", "get", "names", "parameter_names"]
