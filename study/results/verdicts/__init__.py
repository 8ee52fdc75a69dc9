"""Rules and answers: does tuning help, does rank help or overfit, which runs could decide.

Imports the tables of ``results``.
"""
