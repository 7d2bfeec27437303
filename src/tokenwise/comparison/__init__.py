"""compare: the same model and data, many methods, equal budgets, honest costs, one answer."""
