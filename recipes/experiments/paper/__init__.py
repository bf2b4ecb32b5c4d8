"""The paper's four data sets and its training of Llama-3-8B-Instruct, as far as its settings are known."""
