//! The seam to replication: `tercet_proto::storage::Storage`, whose text says what each method means.

use tercet_proto::disk::Item;
use tercet_proto::storage::{
    Incomplete, NewReplica, ReplicaState, SnapshotState, Storage, StorageError, StorageEvent,
};
use tercet_proto::{
    BlockRange, Config, Entry, EntryHeader, Lsn, Promise, ReplicaId, Token, VolumeId,
};

use crate::clone::Awaiting;
use crate::log::Effect;
use crate::replica::Replica;
use crate::store::Store;

impl Storage for Store {
    fn replicas(&self) -> Vec<ReplicaState> {
        self.replicas.iter().map(|(volume, replica)| replica.state(*volume)).collect()
    }

    fn replica(&self, volume: VolumeId) -> Option<ReplicaState> {
        self.replicas.get(&volume).map(|replica| replica.state(volume))
    }

    fn snapshots(&self, volume: VolumeId) -> Vec<SnapshotState> {
        let replica = self.replicas.get(&volume);
        replica.map_or_else(Vec::new, |replica| {
            replica.snapshots.iter().map(|snapshot| snapshot.state.clone()).collect()
        })
    }

    fn create_replica(&mut self, new: NewReplica, token: Token) {
        let (map, incomplete) = match self.prepare_create(&new) {
            Ok(prepared) => prepared,
            Err(error) => return self.done(token, Err(error)),
        };
        let number = self.next_number;
        self.next_number += 1;
        let item = Item::Create {
            volume: new.volume,
            number,
            replica: new.replica,
            name: new.name.clone(),
            size_blocks: new.size_blocks,
            source: new.source,
            incomplete: incomplete.is_some(),
        };
        if let Some(Incomplete::Awaits(source)) = incomplete {
            self.await_snapshot(new.volume, Awaiting::new(number, new.size_blocks, source));
        }
        let replica = Replica::new(number, new.replica, new.name, map, new.size_blocks);
        let replica = Box::new(Replica { incomplete, ..replica });
        self.creating.insert(new.volume);
        self.log.unsettled += 1;
        self.push_change(&item, Effect::Create { volume: new.volume, replica, token });
    }

    fn delete_replica(&mut self, volume: VolumeId, replica: ReplicaId, token: Token) {
        if let Err(error) = self.alive() {
            return self.done(token, Err(error));
        }
        match self.replicas.get_mut(&volume) {
            Some(found) if found.replica == replica => {
                found.deleting = true;
                let number = found.number;
                let item = Item::Delete { volume, number };
                self.push_change(&item, Effect::Delete { volume, number, token });
            }
            _ => self.done(token, Ok(())),
        }
    }

    fn tombstone(&self, volume: VolumeId) -> Option<Config> {
        self.tombstones.iter().find(|stone| stone.volume == volume)?.config.clone()
    }

    fn set_promise(&mut self, volume: VolumeId, promise: Promise, token: Token) {
        match self.live_replica(volume) {
            Ok(replica) => {
                let number = replica.number;
                let older = replica.promise.as_ref().map(Promise::epoch);
                assert!(Some(promise.epoch()) >= older, "a promise never falls");
                let config = promise.config.clone();
                let promise = Box::new(promise);
                let item = Item::Promise { volume, number, config };
                self.push_change(&item, Effect::Promise { volume, number, promise, token });
            }
            Err(error) => self.done(token, Err(error)),
        }
    }

    fn set_incomplete(&mut self, volume: VolumeId, incomplete: Option<Incomplete>, token: Token) {
        match self.live_replica(volume) {
            Ok(_) => self.push_incomplete(volume, incomplete, Some(token)),
            Err(error) => self.done(token, Err(error)),
        }
    }

    fn append(
        &mut self,
        volume: VolumeId,
        drop_after: Option<Lsn>,
        entries: Vec<Entry>,
    ) -> Result<(), StorageError> {
        if let Err(error) = self.admit(volume, &entries) {
            if error == StorageError::Busy {
                self.turned_away.insert(volume);
            }
            return Err(error);
        }
        let mut drop_after = drop_after.filter(|after| *after < self.replicas[&volume].tail.lsn);
        if entries.is_empty()
            && let Some(after) = drop_after
        {
            self.log.make_room(0, 256);
            let number = self.replicas[&volume].number;
            let dropped = self.drop_behind(volume, after);
            self.log.push(&Item::Drop { volume, number, after }, None);
            self.log.unsettled += 1;
            self.log.push_effect(Effect::Dropped { entries: dropped });
            self.changed = true;
        }
        for entry in entries {
            self.append_entry(volume, drop_after.take(), entry);
        }
        Ok(())
    }

    fn header(&self, volume: VolumeId, lsn: Lsn) -> Option<EntryHeader> {
        self.replicas.get(&volume)?.entry(lsn).map(|entry| entry.header)
    }

    fn in_flight(&self, volume: VolumeId) -> bool {
        self.replicas.get(&volume).is_some_and(|replica| replica.in_flight > 0)
    }

    fn read_log(&mut self, volume: VolumeId, from: Lsn, bytes_max: usize, token: Token) {
        let result = self.live_replica(volume).map(|_| ());
        match result.and_then(|()| self.start_log_read(volume, from, bytes_max, token)) {
            Ok(()) => {}
            Err(error) => self.events.push(StorageEvent::Log { token, result: Err(error) }),
        }
    }

    fn apply(&mut self, volume: VolumeId, lsn: Lsn) {
        let Ok(replica) = self.live_replica(volume) else {
            return;
        };
        assert!(lsn <= replica.durable.lsn, "W5: only what is durable here is applied");
        if replica.applied.lsn < lsn {
            self.apply_up_to(volume, lsn);
        }
    }

    fn read(&mut self, volume: VolumeId, range: BlockRange, token: Token) {
        let result = self.live_replica(volume).map(|_| ());
        match result.and_then(|()| self.start_read(volume, range, token)) {
            Ok(()) => {}
            Err(error) => self.events.push(StorageEvent::Read { token, result: Err(error) }),
        }
    }

    fn chunk_map(&mut self, volume: VolumeId, from: u64, token: Token) {
        if let Err(error) = self.start_chunks(volume, from, token) {
            self.events.push(StorageEvent::Chunks { token, result: Err(error) });
        }
    }

    fn chunk_sums(&mut self, volume: VolumeId, token: Token) {
        match self.live_replica(volume) {
            Ok(replica) => {
                let map = replica.head.clone();
                self.start_sums(volume, map, token);
            }
            Err(error) => self.events.push(StorageEvent::Read { token, result: Err(error) }),
        }
    }
}
