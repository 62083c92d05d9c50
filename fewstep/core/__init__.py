"""The contracts: what a mixer, a model, a drafter, a process, an objective and a recipe are. No technique lives here."""
