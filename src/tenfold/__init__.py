"""tenfold: sparse (Mixture-of-Experts) language models, with an honest meter."""
