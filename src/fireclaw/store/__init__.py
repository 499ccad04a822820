"""The store: one SQLite file that holds the truth about machines, processes and agents.

``database`` opens it and knows every noun's schema; each other module is one noun with its rows and queries.
"""
