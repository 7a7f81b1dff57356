-- A run store as schema version 1 wrote it.
PRAGMA user_version=1;
BEGIN TRANSACTION;
CREATE TABLE artifacts (
	"key" INTEGER NOT NULL, 
	run_id VARCHAR NOT NULL, 
	uri VARCHAR NOT NULL, 
	sha256 VARCHAR NOT NULL, 
	size INTEGER NOT NULL, 
	kind VARCHAR NOT NULL, 
	name VARCHAR NOT NULL, 
	PRIMARY KEY ("key"), 
	UNIQUE (run_id, uri, kind, name)
);
INSERT INTO "artifacts" VALUES(1,'20261101-120000-aaaaaa','blob://sha256/aa','aa',3,'weights','final');
CREATE TABLE events (
	run_id VARCHAR NOT NULL, 
	seq INTEGER NOT NULL, 
	time FLOAT NOT NULL, 
	name VARCHAR NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (run_id, seq)
)
 WITHOUT ROWID

;
INSERT INTO "events" VALUES('20261101-120000-aaaaaa',1,1.0,'workflow.start','{"recipe":"supervised","config":{"model":"tiny"}}');
INSERT INTO "events" VALUES('20261101-120000-aaaaaa',2,2.0,'training.step','{"step":1,"epoch":0,"loss":0.5,"lr":0.001,"tokens_per_sec":9.5,"grad_norm":2.0,"total_steps":0}');
INSERT INTO "events" VALUES('20261101-120200-cccccc',1,1.0,'workflow.start','{"recipe":"supervised","config":{}}');
CREATE TABLE manifests (
	run_id VARCHAR NOT NULL, 
	data TEXT NOT NULL, 
	PRIMARY KEY (run_id)
);
INSERT INTO "manifests" VALUES('20261101-120000-aaaaaa','{"seed":7}');
CREATE TABLE runs (
	"key" INTEGER NOT NULL, 
	run_id VARCHAR NOT NULL, 
	workflow VARCHAR NOT NULL, 
	status VARCHAR NOT NULL, 
	config TEXT NOT NULL, 
	config_hash VARCHAR NOT NULL, 
	created_at FLOAT NOT NULL, 
	finished_at FLOAT, 
	result TEXT, 
	error TEXT, 
	PRIMARY KEY ("key"), 
	UNIQUE (run_id)
);
INSERT INTO "runs" VALUES(1,'20261101-120000-aaaaaa','supervised','completed','{"epochs": 1, "model": "tiny"}','ff',10.0,15.0,'{"metrics": {"training.step.loss": 0.5}}',NULL);
INSERT INTO "runs" VALUES(2,'20261101-120100-bbbbbb','supervised','failed','{}','ff',20.0,25.0,'{}','{"code": "data", "message": "m"}');
INSERT INTO "runs" VALUES(3,'20261101-120200-cccccc','supervised','running','{}','ff',30.0,NULL,NULL,NULL);
CREATE INDEX runs_by_age ON runs (created_at);
COMMIT;
