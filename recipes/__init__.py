"""The papers' experiments, each table and figure one command: `python -m recipes.inspo table2`.

README.md lists them; steps.py says how an experiment is run.
"""
