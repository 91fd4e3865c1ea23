"""Solvers of linear models: bases, logistic regression, discriminant analysis, ridge with rows left out."""
