"""A plug-in: how good is always giving the commonest answer?

It uses the package's public face only, as anybody's would. Read next: ``majority_baseline.workflow``.
"""
