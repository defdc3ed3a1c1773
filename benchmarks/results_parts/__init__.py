"""What benchmarks/results_page.py is made of."""
