"""The merge engine: recipe → plan → engine → writer."""
