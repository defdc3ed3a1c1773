"""Methods × seeds × budgets on the same text, initialisation and order of tokens: cells, their table, their page."""
