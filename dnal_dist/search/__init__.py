"""DNAL itself: architecture, penalty, schedule, budget controller, selection."""
