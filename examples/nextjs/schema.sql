-- The queue of an application on Supabase: run it once, in the SQL editor or as a migration.
-- Photos and videos are in the private bucket group-photos; whoever may see one gets a signed URL.

create table video_items (
  id uuid primary key default gen_random_uuid(),
  user_id uuid not null references auth.users on delete cascade,
  group_id uuid not null,
  photo_id uuid not null default gen_random_uuid(),
  photo_storage_path text not null,
  prompt text not null default '',
  frame_num int,                       -- 24 a second, and one more; null is 121, five seconds
  inference_provider text,             -- wan_local, gen4_turbo, veo3.1, …; null is any
  status text not null default 'pending'
    check (status in ('pending', 'processing', 'completed', 'failed', 'cancelled')),
  cancel_requested boolean not null default false,
  worker_id text,                      -- of the lease; kept after the end, so that a repeated report is known
  leased_until timestamptz,
  renewed boolean not null default false,  -- the worker was heard of under this lease
  crash_count int not null default 0,  -- workers that went silent
  retry_count int not null default 0,  -- failures that were reported; to try again: status 'pending', both counts 0
  stage text,
  fraction real not null default 0,    -- how far it is, 0 to 1
  video_storage_path text,
  error_message text,
  runway_task_id text,
  veo_operation_id text,
  created_at timestamptz not null default clock_timestamp(),
  updated_at timestamptz not null default clock_timestamp()
);

-- None has a column that heartbeats write: PostgreSQL would write the row to every index again, each time.
create index on video_items (created_at, id) where status in ('pending', 'processing');
create index on video_items (id) where status = 'processing';
create index on video_items (user_id, created_at desc);

-- People see their own videos, and write nothing: rows are made by /api/videos, which has the service role's key.
alter table video_items enable row level security;
create policy "people see their own" on video_items for select to authenticated using (user_id = (select auth.uid()));
revoke all on video_items from anon, authenticated;
grant select on video_items to authenticated;
grant select, insert, update, delete on video_items to service_role;

-- The next task, for one worker alone: whoever asks at the same moment skips the row that is locked. One whose lease ran
-- out keeps its place in the line, and is its worker's until another takes it: a clip that is done late is not lost.
create function claim_video(worker text, seconds int, kind text default null) returns setof video_items
language plpgsql set search_path = public as $$
begin
  -- A worker that had renewed and went silent counts; three are enough.
  update video_items set
    crash_count = crash_count + renewed::int,
    status = case when cancel_requested then 'cancelled' else 'failed' end,
    error_message = case when not cancel_requested
                         then '3 workers went silent while they had this task; it was given up' end,
    leased_until = null, updated_at = now()
  where id in (
    select id from video_items
    where status = 'processing' and leased_until <= now() and (cancel_requested or crash_count + renewed::int >= 3)
    for update skip locked
  );
  return query
  update video_items set
    crash_count = crash_count + (status = 'processing' and renewed)::int,
    status = 'processing', worker_id = worker, leased_until = now() + make_interval(secs => seconds),
    renewed = false, cancel_requested = false, stage = null, fraction = 0, updated_at = now()
  where id = (
    select id from video_items
    where status in ('pending', 'processing') and retry_count < 3
      and (status = 'pending'
           or leased_until <= now() and not cancel_requested and crash_count + renewed::int < 3)
      and (kind is null or kind = case  -- what is no model of Runway's is Wan's; Runway's workers would refuse it
             when inference_provider ~ '^(runway_)?(gen3a_turbo|gen4_turbo|gen4\.5(_turbo)?|veo3(\.1(_fast)?)?)$'
             then 'runway' else 'wan' end)
    order by created_at, id limit 1 for update skip locked
  )
  returning *;
end $$;

-- A beat of the worker that has it. One second hands the task back, uncounted.
create function renew_video(item uuid, worker text, seconds int, at_stage text default null, at_fraction real default 0)
returns setof video_items language sql set search_path = public as $$
  update video_items set
    status = case when seconds > 1 then 'processing' when cancel_requested then 'cancelled' else 'pending' end,
    leased_until = case when seconds > 1 then now() + make_interval(secs => seconds) end,
    renewed = seconds > 1,
    stage = coalesce(at_stage, stage), fraction = greatest(fraction, least(at_fraction, 0.99)),
    updated_at = now()
  where id = item and worker_id = worker and status = 'processing'
  returning *;
$$;

-- The end of a lease. The same report again changes nothing and is answered as the first one was.
create function end_video(
  item uuid, worker text, ended_as text, video text default null, problem text default null,
  runway_task text default null, veo_operation text default null
) returns setof video_items language plpgsql set search_path = public as $$
begin
  return query
  update video_items set
    status = case when cancel_requested then 'cancelled' else ended_as end,
    retry_count = retry_count + (ended_as = 'failed')::int,
    video_storage_path = case when not cancel_requested then video end,
    error_message = problem, runway_task_id = runway_task, veo_operation_id = veo_operation,
    fraction = case when ended_as = 'completed' then 1 else fraction end,
    leased_until = null, updated_at = now()
  where id = item and worker_id = worker and status = 'processing'
  returning *;
  if not found then
    return query select * from video_items
    where id = item and worker_id = worker and status in (ended_as, 'cancelled');
  end if;
end $$;

-- A person has changed their mind: at once where the task waits, else with the next beat of its worker.
create function cancel_video(item uuid) returns setof video_items language sql set search_path = public as $$
  update video_items set
    cancel_requested = status = 'processing',
    status = case status when 'pending' then 'cancelled' else status end, updated_at = now()
  where id = item and status in ('pending', 'processing')
  returning *;
$$;

-- Functions are open to everybody unless one says otherwise.
revoke execute on function claim_video, renew_video, end_video, cancel_video from public, anon, authenticated;
grant execute on function claim_video, renew_video, end_video, cancel_video to service_role;
