"""The search for rules: which method for which weight, so that a model of so many bits a weight changes least."""
