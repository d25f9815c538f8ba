"""What is counted. One object, made by the composition root and passed down; nothing here is global."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest


class Metrics:
    """The counters of one running instance. Labels come from configuration or from closed lists only."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"pullcache_{name}", text, labels, registry=self.registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(f"pullcache_{name}", text, labels, registry=self.registry)

        self.requests = counter(
            "requests", "Requests answered, by kind of content, what was decided, and status.", "kind", "decision", "status"
        )
        self.sent_bytes = counter("sent_bytes", "Body bytes sent to clients.")
        self.aborted = counter("aborted", "Bodies that were cut because their end could not be vouched for.")
        self.slow_readers = counter("slow_readers", "Clients cut because they took too little in the time allowed.")
        self.upstream_requests = counter(
            "upstream_requests", "Requests sent upstream, by status class or 'error'.", "upstream", "method", "status"
        )
        self.upstream_bytes = counter("upstream_bytes", "Body bytes of blobs received from upstream.", "upstream")
        self.refused = counter(
            "refused", "What an upstream asked for and did not get: realm, redirect, address.", "upstream", "what"
        )
        self.fills = counter("fills", "Downloads of a blob, by how they ended.", "result")
        self.followers = counter("followers", "Clients that were served from a download another client had started.")
        self.resumes = counter("resumes", "Times that a broken download was continued.")
        self.mismatches = counter("mismatches", "Content refused because digest, size or type was wrong.", "upstream")
        self.unsaved = counter("unsaved", "Downloads passed through without being kept, because of the disk.")
        self.evicted = counter("evicted", "Manifests and blobs removed to make room, or because nothing named them.")
        self.quarantined = counter("quarantined", "Files in the cache directory that were not what they should be.")
        self.stale = counter("stale", "Tags and lists served from the cache because their upstream was failing.", "upstream")
        self.in_flight = gauge("fills_in_flight", "Downloads running now.")
        self.waiting = gauge("fills_waiting", "Downloads that wait for their turn.")
        self.image_places = gauge("image_places", "Images that are being pulled, where their number is limited.")
        self.turned_away = counter("turned_away", "Client connections refused because there were too many.")
        self.connections = gauge("connections", "Client connections open now.")
        self.resting = gauge(
            "endpoint_resting", "1 while an endpoint is asked after the others, since it failed.", "upstream", "endpoint"
        )
        self.unavailable = gauge(
            "upstream_unavailable", "1 while an upstream is not asked, since it gives no answer.", "upstream"
        )
        self.unusable_files = gauge(
            "unusable_files", "Secrets and certificates that cannot be used as they are now; what was good stays.", "what"
        )
        self.rule_hits = counter("rule_hits", "Requests that a rule denied, or would have (dryrun).", "rule", "effect")
        self.insecure = gauge("insecure_upstream", "1 where insecureSkipVerify switches TLS verification off.", "upstream")

    def render(self) -> bytes:
        """All figures in the Prometheus text format."""
        return generate_latest(self.registry)
