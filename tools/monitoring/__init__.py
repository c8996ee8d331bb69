"""Grafana's dashboards and the PrometheusRule, written from code: `make monitoring`."""
