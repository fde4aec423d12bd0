"""Analysis of models: multiply-adds, speed and memory over image sizes, attention weights, reports and pictures."""
